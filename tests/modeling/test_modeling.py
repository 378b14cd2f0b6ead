"""Forward passes: equal to the backbone without latents, exact gradients through latents, save and load."""

import copy
import gc
import json
import weakref

import pytest
import torch
from backbones import FULLY_TESTED
from helpers import (
    LATENT_SIZE,
    SPAN_SAMPLES,
    encode,
    every_backbone,
    gradients,
    largest_difference,
    make_sample,
    next_token_loss,
    perturb,
    prefix_recompute,
)
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from ilvr import ILVRConfig, ILVRForConditionalGeneration, ILVRProcessor
from ilvr.latent_cache import ChunkCache
from ilvr.latent_spans import chunk_bounds
from ilvr.trainer.inputs.image_features import image_outputs, without_pixels


BACKBONES = FULLY_TESTED


@every_backbone
def test_forward_without_latents_is_the_backbones(model, processor, backbone_name):
    inputs = encode(processor, SPAN_SAMPLES, "left", prompt_only=True)
    torch.testing.assert_close(model(**inputs).logits, model.vlm(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right", "none"])
def test_walk_has_the_gradients_of_prefix_recompute(model, processor, padding_side, checkpointing):
    samples = SPAN_SAMPLES[:1] if padding_side == "none" else SPAN_SAMPLES
    inputs = encode(processor, samples, "right" if padding_side == "none" else padding_side)
    model.train()
    expected = gradients(model, next_token_loss(prefix_recompute(model, inputs), inputs))
    if checkpointing:
        model.activation_checkpointing_enable()
    outputs = model(**inputs)
    found = gradients(model, next_token_loss(outputs.logits, inputs))
    assert largest_difference(found, expected) < 1e-5
    # The control: without the feedback's gradient they differ.
    model.activation_checkpointing_disable()
    detached = model(**inputs, latent_values=outputs.predicted_latents.detach())
    assert largest_difference(gradients(model, next_token_loss(detached.logits, inputs)), expected) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_walk_frees_its_keys_and_values(model, processor, monkeypatch, checkpointing):
    caches = []
    original = ChunkCache.of_size
    monkeypatch.setattr(ChunkCache, "of_size", lambda *sizes: caches.append(original(*sizes)) or caches[-1])
    if checkpointing:
        model.activation_checkpointing_enable()
    inputs = encode(processor, SPAN_SAMPLES)
    next_token_loss(model.train()(**inputs).logits, inputs).backward()
    states = [weakref.ref(part) for layer in caches.pop().layers for part in layer.states]
    gc.collect()
    assert states and not any(state() for state in states)


def test_walk_can_be_gone_through_backwards_twice(model, processor):
    inputs = encode(processor, SPAN_SAMPLES)
    loss = next_token_loss(model.train()(**inputs).logits, inputs)
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    twice = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    assert largest_difference(twice, once) < 1e-5


def test_checkpointing_replays_the_layers(model, processor):
    """But for single columns, which are not worth it."""
    inputs = encode(processor, SPAN_SAMPLES)
    bounds = chunk_bounds(inputs["input_ids"] == model.config.latent_pad_token_id)
    wide = sum(stop - start > 1 for start, stop in bounds)
    model.train().activation_checkpointing_enable()
    calls = []
    model.model.core.get_decoder().layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    loss = next_token_loss(model(**inputs).logits, inputs)
    forward_calls = len(calls)
    loss.backward()
    assert (forward_calls, len(calls)) == (len(bounds), len(bounds) + wide)


def test_reentrant_checkpointing_is_refused(model, processor):
    model.train().activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**encode(processor, SPAN_SAMPLES))


@every_backbone
def test_forcing_the_own_latents_changes_nothing(model, processor, backbone_name):
    inputs = encode(processor, SPAN_SAMPLES, "left")
    own = model(**inputs)
    forced = model(**inputs, latent_values=own.predicted_latents)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(forced.logits[real], own.logits[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forced.predicted_latents, own.predicted_latents, rtol=1e-4, atol=1e-4)


def test_forced_latents_reach_their_positions_and_masked_ones_do_not(model, processor):
    inputs = encode(processor, SPAN_SAMPLES)
    values = torch.randn(2, 2, LATENT_SIZE, 32)
    mask = torch.ones(2, 2, LATENT_SIZE, dtype=torch.bool)
    mask[0, 1, 2] = False
    inside = model(**inputs, latent_values=values, latent_mask=mask).latent_inputs
    pad = model.get_input_embeddings().weight[model.config.latent_pad_token_id]
    torch.testing.assert_close(inside[mask], values[mask])
    torch.testing.assert_close(inside[0, 1, 2], pad)


@pytest.mark.parametrize("way", ["forced", "parallel", "fixed_point"])
def test_spans_that_a_row_does_not_have_predict_nothing(backbone_dir, processor, way):
    """Not the bias of the head, which the trainer's residual would count."""
    model = perturb(ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3, latent_head="linear"))
    inputs = encode(processor, [make_sample(["Right", "Down", "Up"]), make_sample(["Left", "Up"])])
    values = torch.randn(2, 2, LATENT_SIZE, 32)
    options = {"forced": {"latent_values": values}, "parallel": {"jacobi_iterations": 2}}
    options["fixed_point"] = {"fixed_point_tolerance": 0.1}
    predicted = model(**inputs, **options[way]).predicted_latents
    assert predicted[1, 1].eq(0).all() and predicted[0].any(-1).all() and predicted[1, 0].any(-1).all()


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((2, 2, 5, 32), None, "5 latents a span; the model's latent_size is 3"),
        ((3, 2, 3, 32), None, r"shape \(3, 2, 3, 32\); it should be \(2, spans, 3, 32\)"),
        ((2, 2, 3, 16), None, r"shape \(2, 2, 3, 16\); it should be \(2, spans, 3, 32\)"),
        ((2, 1, 3, 32), None, "Row 0 has 6 latent positions and latent_values holds 3 a row: 1 spans of 3"),
        ((2, 2, 3, 32), (2, 2), r"latent_mask has shape \(2, 2\); latent_values needs \(2, 2, 3\)"),
    ],
)
def test_latents_that_do_not_fit_are_refused(model, processor, shape, mask, message):
    mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        model(**encode(processor, SPAN_SAMPLES), latent_values=torch.zeros(shape), latent_mask=mask)


def test_ids_and_embeddings_at_once_are_refused(model, processor):
    inputs = encode(processor, SPAN_SAMPLES)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(**inputs, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(attention_mask=inputs["attention_mask"])


def test_precomputed_image_features_equal_pixels(model, processor):
    inputs = encode(processor, SPAN_SAMPLES)
    expected = model(**inputs).logits
    features = image_outputs(inputs, model.model.core)
    inputs = without_pixels(inputs)
    assert "pixel_values" not in inputs
    torch.testing.assert_close(model(**inputs, mm_encoder_outputs={"image": features}).logits, expected)


def later_image(processor):
    """A second user turn with an image comes after the first span, and so in a later chunk of the walk."""
    first, second = SPAN_SAMPLES
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "image": first["images"][0]}, {"type": "text", "text": "Plan"}],
        },
        first["messages"][1],
        {"role": "user", "content": [{"type": "image", "image": first["images"][1]}, {"type": "text", "text": "Up"}]},
        second["messages"][1],
    ]
    return processor.apply_chat_template([turns], tokenize=True, return_dict=True, return_tensors="pt")


@every_backbone
def test_later_image_in_the_sequence(model, processor, backbone_name):
    inputs = later_image(processor)
    images = inputs["input_ids"] == model.config.image_token_id
    is_latent = inputs["input_ids"] == model.config.latent_pad_token_id
    assert (images & (is_latent.cumsum(1) > 0)).any()
    expected = prefix_recompute(model, inputs)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    for exact in ({"jacobi_iterations": int(is_latent.sum())}, {"fixed_point_tolerance": 0.0}):
        torch.testing.assert_close(model(**inputs, **exact).logits, expected, rtol=1e-4, atol=1e-4)


@every_backbone
def test_rescaled_latents_have_the_norm_of_the_config(backbone_dir, processor):
    model = ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3).double()
    embeddings = model.get_input_embeddings()
    words = embeddings(torch.arange(len(embeddings.weight))).norm(dim=-1).mean().item()  # Gemma 3's are scaled
    assert model.config.latent_head == "rescale"
    assert model.config.latent_norm == pytest.approx(words)  # until stage 1 measures the features'
    model.config.latent_norm = 7.0
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in encode(processor, SPAN_SAMPLES).items()}
    outputs = model(**inputs)
    exists = outputs.latent_inputs.any(-1)
    torch.testing.assert_close(outputs.latent_inputs[exists].norm(dim=-1).double(), torch.full((12,), 7.0).double())
    plain = ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3, latent_head="identity").double()
    state = plain(**inputs).predicted_latents[:, 0, 0]  # before the first latent, both have read the same
    torch.testing.assert_close(outputs.predicted_latents[:, 0, 0], 7 * normalize(state, dim=-1), rtol=1e-5, atol=1e-5)


def test_new_models_rescale_and_configs_that_name_no_head_feed_back_as_they_are(backbone_dir, model, tmp_path):
    assert model.config.latent_head == "rescale"
    for head, name in ((None, "rescale"), ("identity", "identity")):
        model = ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3, latent_head=head)
        model.config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["latent_head"] == name  # in each saved config
    assert ILVRConfig().latent_head == "identity"
    with torch.device("meta"):
        abstract = ILVRForConditionalGeneration(ILVRConfig.from_pretrained(tmp_path, latent_head="rescale"))
    assert abstract.config.latent_norm == model.config.latent_norm == 1.0


@pytest.mark.parametrize("head", ["identity", "rescale", "linear", "mlp"])
def test_save_and_load_with_perturbed_weights(backbone_dir, processor, tmp_path, head):
    model = perturb(ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3, latent_head=head), seed=2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = encode(processor, SPAN_SAMPLES)
    for auto_class in (AutoModelForImageTextToText, AutoModel):
        loaded = auto_class.from_pretrained(tmp_path)
        assert isinstance(loaded, ILVRForConditionalGeneration)
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    reloaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(reloaded, ILVRProcessor) and reloaded.latent_size == 3
    assert encode(reloaded, SPAN_SAMPLES)["input_ids"].equal(inputs["input_ids"])
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()
    assert str(backbone_dir) not in (tmp_path / "config.json").read_text()


def test_sdpa_and_eager_agree(model, processor):
    inputs = encode(processor, SPAN_SAMPLES)
    sdpa = model(**inputs).logits
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    assert other.vlm.config.get_text_config()._attn_implementation == "eager"
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(other(**inputs).logits[real], sdpa[real], rtol=1e-4, atol=1e-4)


def test_hidden_states_of_the_walk_are_those_of_one_forward(model, processor):
    inputs = encode(processor, SPAN_SAMPLES)
    own = model(**inputs, output_hidden_states=True)
    forced = model(**inputs, latent_values=own.predicted_latents, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    assert len(own.hidden_states) == len(forced.hidden_states)
    for a, b in zip(own.hidden_states, forced.hidden_states):
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)


def test_bad_configurations_are_refused(backbone_dir, tmp_path, model):
    with pytest.raises(ValueError, match="latent_size"):
        ILVRConfig(latent_size=0)
    with pytest.raises(ValueError, match="latent_head"):
        ILVRConfig(latent_head="conv")
    for norm in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="latent_norm"):
            ILVRConfig(latent_norm=norm)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ILVR checkpoint already"):
        ILVRForConditionalGeneration.from_backbone(tmp_path)
