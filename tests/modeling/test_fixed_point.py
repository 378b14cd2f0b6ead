"""Latents as the fixed point of one forward: the walk's values and gradients, as precisely as asked for."""

import pytest
import torch
from backbones import FULLY_TESTED
from helpers import SPAN_SAMPLES, encode, gradients, largest_difference, make_sample, make_trainer, next_token_loss
from peft import LoraConfig

from ilvr import ILVRForConditionalGeneration
from ilvr.trainer import ILVRTrainingConfig


BACKBONES = FULLY_TESTED


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("latent_head", ["identity", "rescale", "mlp"])
def test_values_and_gradients_are_those_of_the_walk(backbone_dir, processor, latent_head, padding_side, checkpointing):
    model = ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3, latent_head=latent_head).train()
    inputs = encode(processor, SPAN_SAMPLES, padding_side)
    walked = model(**inputs)
    expected = gradients(model, next_token_loss(walked.logits, inputs))
    if checkpointing:
        model.activation_checkpointing_enable()
    found = model(**inputs, fixed_point_tolerance=0.0)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], walked.logits[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.latent_inputs, walked.latent_inputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.predicted_latents, walked.predicted_latents, rtol=1e-4, atol=1e-4)
    assert largest_difference(gradients(model, next_token_loss(found.logits, inputs)), expected) < 1e-4


def test_a_loss_on_latents_reaches_what_made_them(model, processor):
    """As the alignment of stage 2 is."""
    inputs = encode(processor, SPAN_SAMPLES)
    torch.manual_seed(0)
    direction = torch.randn(2, 2, 3, 32)
    expected, found = (
        gradients(model.train(), (model(**inputs, **way).predicted_latents * direction).sum())
        for way in ({}, {"fixed_point_tolerance": 0.0})
    )
    assert largest_difference(found, expected) < 1e-4


def test_the_tolerance_bounds_work_and_error(model, processor):
    inputs = encode(processor, SPAN_SAMPLES)
    model.train()
    walked = model(**inputs)
    expected = gradients(model, next_token_loss(walked.logits, inputs))
    calls, errors = [], []
    layer = model.model.core.get_decoder().layers[0].mlp
    layer.register_forward_hook(lambda *_: calls.append(1))
    for tolerance in (1.0, 0.1, 1e-6):
        calls.clear()
        outputs = model(**inputs, fixed_point_tolerance=tolerance)
        error = (outputs.latent_inputs - walked.latent_inputs).norm() / walked.latent_inputs.norm()
        difference = largest_difference(gradients(model, next_token_loss(outputs.logits, inputs)), expected)
        errors.append((len(calls), error.item(), difference))
    forwards, latents, found = zip(*errors)
    assert forwards[0] < forwards[1] <= forwards[2] <= 2 + 6  # prefix, last forward, and at most S * K
    assert latents[0] > 1e-2 > 1e-5 > latents[2] and found[0] > 1e-2 > 1e-4 > found[2]


def test_without_latents_or_gradients(model, processor):
    words = encode(processor, [make_sample(["Right"])])
    plain = model.train()(**words)
    expected = gradients(model, next_token_loss(plain.logits, words))
    found = model(**words, fixed_point_tolerance=0.0, min_chunks=1)
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-4, atol=1e-4)
    assert largest_difference(gradients(model, next_token_loss(found.logits, words)), expected) < 1e-4
    inputs = encode(processor, SPAN_SAMPLES)
    with torch.no_grad():
        found, walked = model(**inputs, fixed_point_tolerance=0.0).logits, model(**inputs).logits
    torch.testing.assert_close(found[-1, -1], walked[-1, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])])
def test_a_run_is_that_of_the_walk(backbone_dir, processor, tmp_path, peft_config):
    def train(**settings):
        torch.manual_seed(0)
        model = ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3)
        settings = {"stage": 2, "max_steps": 3, "learning_rate": 1e-3, **settings}
        trainer = make_trainer(model, processor, tmp_path, peft_config=peft_config, **settings)
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line]

    for walked, found in zip(train(), train(fixed_point_tolerance=1e-6), strict=True):
        assert found["loss"] == pytest.approx(walked["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(walked["grad_norm"], rel=1e-3)
        assert found["latent_residual"] < 1e-5 and "latent_residual" not in walked


def test_what_cannot_be_solved_is_refused(model, processor, tmp_path):
    inputs = encode(processor, SPAN_SAMPLES)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        model(**inputs, fixed_point_tolerance=-1.0)
    with pytest.raises(ValueError, match="Leave all but one out"):
        model(**inputs, fixed_point_tolerance=0.1, jacobi_iterations=1)
    for settings in ({"stage": 1}, {"stage": 2, "jacobi_iterations": 2}):
        with pytest.raises(ValueError, match="`fixed_point_tolerance` is for stage 2"):
            ILVRTrainingConfig(str(tmp_path), use_cpu=True, bf16=False, fixed_point_tolerance=0.1, **settings)


def test_a_sharded_model_is_refused(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("ilvr.trainer.ilvr_trainer.is_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match="fixed_point_tolerance takes as many forwards as a batch needs"):
        make_trainer(model, processor, tmp_path, stage=2, fixed_point_tolerance=0.1)
