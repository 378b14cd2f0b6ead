"""Latents computed all at once: equal to the walk in the limit, and before it to the iteration written plainly."""

import pytest
import torch
from backbones import FULLY_TESTED
from helpers import (
    LATENT_SIZE,
    PROMPTS,
    SPAN_SAMPLES,
    STEPS,
    encode,
    generate,
    gradients,
    largest_difference,
    make_sample,
    make_trainer,
    next_token_loss,
)
from transformers import DynamicCache

from ilvr.trainer import ILVRTrainingConfig


BACKBONES = FULLY_TESTED
ALL = 2 * LATENT_SIZE  # latents of the longest row: so many iterations are exact


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_enough_iterations_have_the_logits_and_gradients_of_the_walk(model, processor, padding_side, checkpointing):
    inputs = encode(processor, SPAN_SAMPLES, padding_side)
    model.train()
    walked = model(**inputs)
    expected = gradients(model, next_token_loss(walked.logits, inputs))
    if checkpointing:
        model.activation_checkpointing_enable()
    outputs = model(**inputs, jacobi_iterations=ALL)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[real], walked.logits[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.latent_inputs, walked.latent_inputs, rtol=1e-4, atol=1e-4)
    assert largest_difference(gradients(model, next_token_loss(outputs.logits, inputs)), expected) < 1e-4
    # The control: too few iterations leave a difference, in latents and gradients.
    few = model(**inputs, jacobi_iterations=2)
    assert (few.latent_inputs - walked.latent_inputs).norm() > 1e-2 * walked.latent_inputs.norm()
    assert largest_difference(gradients(model, next_token_loss(few.logits, inputs)), expected) > 1e-2


def plain_iteration(model, inputs, iterations: int, gradient_iterations: int):
    """Forwards of whole sequences, each with the latents that the one before predicts."""
    is_latent = inputs["input_ids"] == model.config.latent_pad_token_id
    pad = model.get_input_embeddings().weight[model.config.latent_pad_token_id]
    latents = pad.expand(len(is_latent), int(is_latent.sum(1).max()) // LATENT_SIZE, LATENT_SIZE, -1)
    first = model(**inputs, latent_values=latents).predicted_latents[:, 0, 0]
    starts = is_latent.int().argmax(1)
    known = (starts == starts.min()).view(-1, 1, 1, 1)  # of a row that starts later, the first pass knows nothing
    known = known & (torch.arange(latents.shape[1] * LATENT_SIZE).view(1, -1, LATENT_SIZE, 1) == 0)
    latents = torch.where(known, first.view(len(is_latent), 1, 1, -1), latents)
    for iteration in range(iterations):
        with torch.set_grad_enabled(iteration >= iterations - gradient_iterations):
            latents = model(**inputs, latent_values=latents).predicted_latents
    return model(**inputs, latent_values=latents)


@pytest.mark.parametrize(("iterations", "gradient_iterations"), [(1, 1), (2, 2), (3, 2), (3, 1), (2, 0)])
def test_iterations_are_those_written_plainly(model, processor, iterations, gradient_iterations):
    inputs = encode(processor, SPAN_SAMPLES, "left")
    model.train()
    expected = plain_iteration(model, inputs, iterations, gradient_iterations)
    found = model(**inputs, jacobi_iterations=iterations, jacobi_gradient_iterations=gradient_iterations)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-4, atol=1e-4)
    num_latents = (inputs["input_ids"] == model.config.latent_pad_token_id).sum(1)
    for row, used in enumerate(num_latents // LATENT_SIZE):
        for name in ("latent_inputs", "predicted_latents"):
            torch.testing.assert_close(found[name][row, :used], expected[name][row, :used], rtol=1e-4, atol=1e-4)
    expected, found = (gradients(model, next_token_loss(o.logits, inputs)) for o in (expected, found))
    assert largest_difference(found, expected) < 1e-4
    if gradient_iterations < iterations:  # the control
        whole = model(**inputs, jacobi_iterations=iterations)
        assert largest_difference(gradients(model, next_token_loss(whole.logits, inputs)), expected) > 1e-3


@pytest.mark.parametrize(("iterations", "gradient_iterations"), [(0, None), (2, 3), (2, -1)])
def test_iterations_out_of_range_are_refused(model, processor, iterations, gradient_iterations):
    inputs = encode(processor, SPAN_SAMPLES)
    with pytest.raises(ValueError, match=f"got {iterations} and"):
        model(**inputs, jacobi_iterations=iterations, jacobi_gradient_iterations=gradient_iterations)


@pytest.mark.parametrize("words", [["Right", "Down", "Up"], ["Right"]])
def test_batches_with_and_without_latents_run_as_many_forwards_and_backwards(model, processor, words):
    """Ranks of a sharded model wait for each other at each of them."""
    inputs = encode(processor, [make_sample(words)])
    plain = model.train()(**inputs)
    calls = []
    layer = model.model.core.get_decoder().layers[0].mlp
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    outputs = model(**inputs, jacobi_iterations=3, jacobi_gradient_iterations=2, min_chunks=1)
    next_token_loss(outputs.logits, inputs).backward()
    assert calls == ["forward"] * 5 + ["backward"] * 4
    if len(words) == 1:
        torch.testing.assert_close(outputs.logits, plain.logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- generation

LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def prompts(processor):
    return encode(processor, PROMPTS, "left", prompt_only=True)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("steps", [STEPS, [(1, 9)] * 3])
def test_generation_with_enough_iterations_is_the_sequential_one(model, prompts, steps, num_beams):
    """Rows in mixed phases, and rows that enter their spans together and have them computed ahead."""
    options = {"num_beams": num_beams, "output_latents": True, **LOGITS}
    expected = generate(model, prompts, steps, **options)
    found = generate(model, prompts, steps, jacobi_iterations=LATENT_SIZE - 1, **options)
    assert found.sequences.equal(expected.sequences)
    assert_all_close([*found.logits, *found.latents], [*expected.logits, *expected.latents])


def assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_batch_and_single_have_the_same_approximate_latents(model, processor, prompts):
    options = {"jacobi_iterations": 1, "output_latents": True, **LOGITS}
    batch, exact = (
        generate(model, prompts, **options),
        generate(model, prompts, output_latents=True, **LOGITS),
    )
    for row in range(2):
        single = encode(processor, PROMPTS[row : row + 1], prompt_only=True)
        alone = generate(model, single, STEPS[row : row + 1], **options)
        assert_all_close(
            [alone.latents[0], *alone.logits], [batch.latents[row], *(step[[row]] for step in batch.logits)]
        )
        difference = (batch.latents[row] - exact.latents[row])[0]  # in the first span
        assert difference[:2].abs().max() < 1e-4 < difference[2:].abs().max()  # one iteration: two are exact


def test_generation_and_forward_agree_on_the_first_span(model, processor):
    prompt = encode(processor, PROMPTS[:1], prompt_only=True)
    output = generate(model, prompt, [(1,)], jacobi_iterations=1, return_dict_in_generate=True, output_latents=True)
    whole = {**prompt, "input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    whole.pop("mm_token_type_ids", None)
    assert_all_close(model(**whole, jacobi_iterations=1).latent_inputs, output.latents)


def test_rows_that_go_together_take_fewer_forwards(model, prompts):
    calls = []
    model.model.core.register_forward_hook(lambda *_: calls.append(1))
    generate(model, prompts, [(1, 9)] * 3)
    sequential = len(calls)
    calls.clear()
    generate(model, prompts, [(1, 9)] * 3, jacobi_iterations=1)
    assert len(calls) == sequential - 2 * (LATENT_SIZE - 2)


@pytest.mark.parametrize("steps", [STEPS, [(1, 9)] * 3])
def test_interventions_reach_the_iterations(model, prompts, steps):
    def turn_the_first(latents, span, index):
        return torch.where((index == 0).unsqueeze(1), -latents, latents)

    options = {"latent_intervention": turn_the_first, "output_latents": True, **LOGITS}
    expected = generate(model, prompts, steps, **options)
    found = generate(model, prompts, steps, jacobi_iterations=LATENT_SIZE - 1, **options)
    assert_all_close([*found.logits, *found.latents], [*expected.logits, *expected.latents])


def test_a_cache_returned_within_a_span_holds_what_was_generated(model, processor):
    prompt = encode(processor, PROMPTS[:1], prompt_only=True)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True}  # a word, start, two pads
    expected, found = (generate(model, prompt, [(1,)], **options, **more) for more in ({}, {"jacobi_iterations": 2}))
    keys = [[layer.keys for layer in output.past_key_values.layers] for output in (found, expected)]
    assert_all_close(*keys)


@pytest.mark.parametrize("stop", ["length", "error"])
def test_a_cache_of_the_callers_own_is_not_left_with_columns_ahead(model, processor, stop):
    """Also where plain ids are returned, or a hook fails, within a span."""
    prompt = encode(processor, PROMPTS[:1], prompt_only=True)
    cache, width = DynamicCache(config=model.config.get_text_config()), prompt["input_ids"].shape[1]

    def fail(input_ids, scores):
        if input_ids.shape[1] == width + 4:
            raise RuntimeError("stopped")
        return torch.zeros(len(input_ids), dtype=torch.bool)

    options = {"past_key_values": cache, "jacobi_iterations": 2, "max_new_tokens": 4, "min_new_tokens": 4}
    if stop == "error":
        with pytest.raises(RuntimeError, match="stopped"):
            generate(model, prompt, [(1,)], stopping_criteria=[fail], **options)
    else:
        ids = generate(model, prompt, [(1,)], **options)
        assert ids[0, -2:].tolist() == [model.config.latent_pad_token_id] * 2
    assert cache.get_seq_length() == width + 3
    assert [name for name in vars(cache) if "latent" in name or "ahead" in name] == ["latent_spans"]
    assert not cache.latent_spans.has_columns_ahead


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jacobi_iterations": 0}, "at least 1, got 0"),
        ({"use_cache": False}, "need use_cache=True"),
        ({"output_hidden_states": True}, "no hidden states"),
        ({"cache_implementation": "static"}, "Use a dynamic cache"),
    ],
)
def test_generation_that_cannot_iterate_is_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"jacobi_iterations": 1, **options})


# --------------------------------------------------------------------------------------------------------- the trainer


def test_trainer_logs_what_is_left_to_refine(model, processor, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("ilvr.trainer.ilvr_trainer.logger.warning_once", messages.append)

    def residual(iterations: int) -> float:
        settings = {"stage": 2, "max_steps": 1, "learning_rate": 0.0, "jacobi_iterations": iterations}
        trainer = make_trainer(model, processor, tmp_path, **settings)
        trainer.train()
        return trainer.state.log_history[0]["latent_residual"]

    assert residual(9) < 1e-5 and not messages  # up to three spans of three latents
    left = residual(1)
    assert left > 0.1 and f"change the latents by {left:.2g} of their length" in messages[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 1, "jacobi_iterations": 2}, "is for stage 2"),
        ({"stage": 2, "jacobi_iterations": 0}, "at least 1"),
        ({"stage": 2, "jacobi_iterations": 2, "jacobi_gradient_iterations": 3}, "between 0 and"),
        ({"stage": 2, "jacobi_gradient_iterations": 1}, "between 0 and"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ILVRTrainingConfig(str(tmp_path), use_cpu=True, **settings)
