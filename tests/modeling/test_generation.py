"""Latent spans in `generate`: every decoding mode gives what an uncached recomputation gives."""

import pytest
import torch
from backbones import FULLY_TESTED
from helpers import (
    LATENT_SIZE,
    NEW_TOKENS,
    PROMPTS,
    STEPS,
    StartSpansAt,
    encode,
    generate,
    make_sample,
    run_without_ilvr,
)
from transformers import TextStreamer, pipeline

from ilvr.latent_generation import LatentSpanLogitsProcessor


BACKBONES = FULLY_TESTED


@pytest.fixture
def inputs(processor):
    return encode(processor, PROMPTS, "left", prompt_only=True)


def test_spans_have_the_right_form_and_rows_are_in_mixed_phases(model, inputs):
    ids = generate(model, inputs)[:, inputs["input_ids"].shape[1] :]
    start, pad, end = (getattr(model.config, f"latent_{k}_token_id") for k in ("start", "pad", "end"))
    span = [start] + [pad] * LATENT_SIZE + [end]
    for row, steps in zip(ids.tolist(), STEPS):
        for step in steps:
            assert row[step : step + len(span)] == span
        assert row.count(pad) == LATENT_SIZE * len(steps) and row.count(end) == len(steps)


def test_cached_equals_uncached_equals_chunked_prefill_equals_static(model, inputs):
    expected = generate(model, inputs)
    assert generate(model, inputs, use_cache=False).equal(expected)
    assert generate(model, inputs, prefill_chunk_size=5).equal(expected)
    assert generate(model, inputs, cache_implementation="static").equal(expected)


def test_feedback_is_what_makes_the_difference(model, inputs):
    """The control of the test above: latents set to zero change what is likely to be said."""
    options = {"return_dict_in_generate": True, "output_logits": True}
    zeroed = generate(
        model, inputs, latent_intervention=lambda latents, span, index: torch.zeros_like(latents), **options
    )
    assert max((a - b).abs().max() for a, b in zip(zeroed.logits, generate(model, inputs, **options).logits)) > 0.01


def test_batch_equals_singles(model, processor, inputs):
    width = inputs["input_ids"].shape[1]
    batch = generate(model, inputs)[:, width:]
    for row, (prompt, steps) in enumerate(zip(PROMPTS, STEPS)):
        single = encode(processor, [prompt], prompt_only=True)
        ids = generate(model, single, [steps])[:, single["input_ids"].shape[1] :]
        assert ids[0].equal(batch[row])


def test_logits_of_generation_equal_those_of_a_forward_over_the_result(model, inputs):
    output = generate(model, inputs, return_dict_in_generate=True, output_logits=True)
    width = inputs["input_ids"].shape[1]
    new = output.sequences.shape[1] - width
    whole = {**inputs, "input_ids": output.sequences}
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(3, new, dtype=torch.long)], 1)
    whole.pop("mm_token_type_ids", None)
    logits = model(**whole).logits[:, width - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, 1), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_output_latents_are_the_models_own(model, processor, inputs, num_beams):
    output = generate(model, inputs, num_beams=num_beams, return_dict_in_generate=True, output_latents=True)
    assert [tuple(latents.shape) for latents in output.latents] == [(2, 3, 32), (1, 3, 32), (0, 3, 32)]
    for row, latents in enumerate(output.latents[:2]):
        single = encode(processor, PROMPTS[row : row + 1], prompt_only=True)
        words = output.sequences[row : row + 1, inputs["input_ids"].shape[1] :]
        single["input_ids"] = torch.cat([single["input_ids"], words], 1)
        for name in ("attention_mask", "mm_token_type_ids"):
            single.pop(name, None)
        predicted = model(**single).predicted_latents
        torch.testing.assert_close(predicted[0], latents, rtol=1e-4, atol=1e-4)


def test_beam_scores_equal_the_log_probabilities_of_the_words(model, inputs):
    """Forced ids count 0, and a beam keeps its own latents when beams are reordered."""
    output = generate(model, inputs, num_beams=3, return_dict_in_generate=True, output_scores=True, length_penalty=0.0)
    width = inputs["input_ids"].shape[1]
    whole = {**inputs, "input_ids": output.sequences}
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(3, NEW_TOKENS, dtype=torch.long)], 1)
    whole.pop("mm_token_type_ids", None)
    logits = model(**whole).logits[:, width - 1 : -1]
    expected = torch.zeros(3)
    forced = LatentSpanLogitsProcessor(
        model.config.latent_start_token_id, model.config.latent_pad_token_id, model.config.latent_end_token_id, 3
    )
    starts = StartSpansAt(model.config.latent_start_token_id, width, STEPS)
    eos = model.generation_config.eos_token_id
    for step in range(NEW_TOKENS):
        scores = logits[:, step].log_softmax(-1)
        scores[:, eos] = -torch.inf  # min_new_tokens
        before = output.sequences[:, : width + step]
        scores = forced(before, starts(before, scores))
        expected += scores.gather(1, output.sequences[:, width + step, None]).squeeze(1)
    torch.testing.assert_close(output.sequences_scores, expected, rtol=1e-4, atol=1e-3)


def test_prompt_with_spans_of_an_earlier_turn(model, processor, backbone_name):
    """The prefill walks through them; where a static cache comes with masks that cannot be cut, it is refused."""
    sample = make_sample(["Right", "Up", "Left"])
    first = {
        "role": "user",
        "content": [{"type": "image", "image": sample["images"][0]}, {"type": "text", "text": "Go"}],
    }
    turns = [first, sample["messages"][1], {"role": "user", "content": [{"type": "text", "text": "Plan"}]}]
    inputs = processor.apply_chat_template(
        [turns], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = generate(model, inputs, [(2,)], use_cache=False)
    assert generate(model, inputs, [(2,)]).equal(expected)
    assert generate(model, inputs, [(2,)], prefill_chunk_size=7).equal(expected)
    if backbone_name == "qwen2_5_vl":
        with pytest.raises(ValueError, match="dynamic cache"):
            generate(model, inputs, [(2,)], cache_implementation="static")
    else:
        assert generate(model, inputs, [(2,)], cache_implementation="static").equal(expected)


def test_sampling_and_streaming(model, processor, capsys):
    inputs = encode(processor, PROMPTS[:1], prompt_only=True)
    torch.manual_seed(0)
    generate(model, inputs, [(1,)], do_sample=True, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert "<|latent_start|><|latent_pad|><|latent_pad|><|latent_pad|><|latent_end|>" in capsys.readouterr().out


def test_intervention_sees_spans_and_positions(model, inputs):
    seen = set()

    def record(latents, span, index):
        seen.update((row, int(s), int(i)) for row, (s, i) in enumerate(zip(span, index)) if s >= 0)
        return latents

    assert generate(model, inputs, latent_intervention=record).equal(generate(model, inputs))
    assert {(0, 0, 0), (0, 0, 2), (0, 1, 0), (1, 0, 1)} <= seen


def test_span_ids_cannot_be_sampled_outside_a_span():
    processor = LatentSpanLogitsProcessor(start_id=5, pad_id=6, end_id=7, latent_size=2, suppressed=(3,))
    scores = torch.zeros(4, 8)
    ids = torch.tensor([[1, 1, 1, 2], [1, 1, 2, 5], [1, 1, 5, 6], [1, 5, 6, 6]])
    processed = processor(ids, scores)
    assert processed[0].isinf().nonzero().flatten().tolist() == [3, 6, 7]
    for row, forced in ((1, 6), (2, 6), (3, 7)):
        assert processed[row, forced] == 0 and processed[row].isinf().sum() == 7
    assert scores.eq(0).all()


def test_unsupported_modes_are_refused(model, inputs):
    with pytest.raises(ValueError, match="Assisted decoding"):
        model.generate(**inputs, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        model.generate(**inputs, output_latents=True)
    with pytest.raises(ValueError, match="use_cache"):
        model.generate(**inputs, output_latents=True, use_cache=False, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="not used by the model: \\['pixel_valeus'\\]"):
        model.generate(**inputs, pixel_valeus=inputs["pixel_values"])


def test_pipeline(model, processor):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    sample = PROMPTS[1]
    content = [{"type": "image", "image": sample["images"][0]}, sample["messages"][0]["content"][1]]
    answer = pipe(text=[{"role": "user", "content": content}], max_new_tokens=5)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_remote_code_loads_in_a_process_without_the_package(model, processor, tmp_path):
    """What a user of the Hub has: the folder, transformers, and no `ilvr`."""
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    inputs = encode(processor, PROMPTS[:1], prompt_only=True)
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    out = run_without_ilvr(
        f"""
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
folder = {str(tmp_path / "checkpoint")!r}
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == type(model).__name__
assert processor.latent_size == 3 and processor.tokenizer("<|latent_pad|>")["input_ids"]
inputs = torch.load({str(tmp_path / "inputs.pt")!r})
print("ids", model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())
""",
        tmp_path / "modules",
    )
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    assert f"ids {expected}" in out
