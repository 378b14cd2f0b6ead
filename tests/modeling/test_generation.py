"""Latent spans in `generate`: every decoding mode gives what an uncached recomputation gives."""

import inspect

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
from transformers import CompileConfig, DynamicCache, GenerationConfig, LogitsProcessorList, TextStreamer, pipeline

from ilvr import ILVRForConditionalGeneration, is_forced, pad_spans
from ilvr.latent_cache import CACHE
from ilvr.latent_generation import LatentSpanLogitsProcessor
from ilvr.latent_spans import ColumnFacts, SpanState


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


def test_a_misspelt_input_is_refused(model, inputs):
    with pytest.raises(ValueError, match="not used by the model: \\['pixel_valeus'\\]"):
        model.generate(**inputs, pixel_valeus=inputs["pixel_values"])


WARPERS = [
    {"top_p": 0.9},
    {"min_p": 0.3},
    {"typical_p": 0.3},
    {"top_k": 1},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"epsilon_cutoff": 3e-4, "num_beams": 2},
]


@pytest.mark.parametrize("warper", WARPERS, ids=str)
def test_sampling_in_batches(model, inputs, warper):
    """Also where the model would most like to say what it must not, as rows do that have ended."""
    width, config = inputs["input_ids"].shape[1], model.config

    def prefer_a_latent_id(input_ids, scores):
        scores[:, config.latent_end_token_id] = scores.amax() + 100
        return scores

    starts = StartSpansAt(config.latent_start_token_id, width, STEPS)
    processors = LogitsProcessorList([prefer_a_latent_id, starts])
    torch.manual_seed(0)
    ids = model.generate(**inputs, logits_processor=processors, do_sample=True, max_new_tokens=16, **warper)
    span = [config.latent_start_token_id, *[config.latent_pad_token_id] * LATENT_SIZE, config.latent_end_token_id]
    for row, steps in zip(ids[:, width:].tolist(), STEPS):
        for step in steps:
            assert row[step : step + len(span)] == span[: len(row) - step]
        assert row.count(config.latent_end_token_id) == len(steps)


LATENTS = {"return_dict_in_generate": True, "output_latents": True}
IGNORE_LATENTS = {"latent_intervention": lambda latents, span, index: latents * 0}


@pytest.mark.parametrize("where", ["keyword", "config", "model"])
@pytest.mark.parametrize(
    ("settings", "asked", "message"),
    [
        ({"use_cache": False}, {"output_latents": True}, "need use_cache=True"),
        ({"use_cache": False}, IGNORE_LATENTS, "need use_cache=True"),
        ({"use_cache": False}, {"jacobi_iterations": 1}, "need use_cache=True"),
        ({"return_dict_in_generate": False}, {"output_latents": True}, "needs return_dict_in_generate=True"),
        ({"output_attentions": True}, {"jacobi_iterations": 1}, "no hidden states or attentions"),
        ({"prompt_lookup_num_tokens": 2}, {}, "Assisted decoding"),
        ({"assistant_early_exit": 1}, {}, "Assisted decoding"),
        ({"guidance_scale": 2.0}, {}, "guidance_scale=2.0 runs a second"),
        ({"cache_implementation": "paged"}, {}, "Continuous batching"),
    ],
)
def test_settings_are_refused_wherever_they_come_from(model, inputs, where, settings, asked, message):
    if where == "keyword":
        options = settings
    elif where == "config":
        options = {"generation_config": GenerationConfig(max_new_tokens=4, **settings)}
    else:
        model.generation_config.update(**settings)
        options = {}
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **options, **asked)


def test_settings_of_a_config_hold(model, inputs):
    """Latents are returned where the config alone asks for a place for them."""
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    starts = StartSpansAt(model.config.latent_start_token_id, inputs["input_ids"].shape[1], STEPS)
    output = model.generate(
        **inputs, generation_config=config, logits_processor=LogitsProcessorList([starts]), output_latents=True
    )
    assert [len(latents) for latents in output.latents] == [2, 1, 0]


def test_checkpointing_in_train_mode_is_refused_where_it_would_drop_the_cache(model, inputs):
    expected = generate(model, inputs)
    model.train().activation_checkpointing_enable()
    with pytest.raises(ValueError, match="drops the cache"):
        generate(model, inputs)
    assert generate(model, inputs, use_cache=False).equal(expected)
    assert generate(model.eval(), inputs).equal(expected)


def test_an_assistant_is_refused(model, inputs):
    with pytest.raises(ValueError, match="Assisted decoding"):
        model.generate(**inputs, assistant_model=model.vlm)


def test_continuous_batching_is_refused_at_once(model):
    with pytest.raises(ValueError, match="Call generate with a dynamic cache"):
        model.generate_batch([[1, 2]])
    with pytest.raises(ValueError, match="Call generate with a dynamic cache"):
        model.init_continuous_batching()


def test_allowed_tokens_leave_spans_alone_or_are_refused(model, inputs):
    config = model.config
    words = [i for i in range(10, 60) if i != config.image_token_id] + [config.latent_start_token_id]
    ids = generate(model, inputs, prefix_allowed_tokens_fn=lambda row, ids: words, min_new_tokens=0)
    new = ids[:, inputs["input_ids"].shape[1] :]
    span = [config.latent_start_token_id, *[config.latent_pad_token_id] * LATENT_SIZE, config.latent_end_token_id]
    assert new[0, 1:6].tolist() == span and set(new.flatten().tolist()) <= {*words, *span}
    with pytest.raises(ValueError, match=r"prefix_allowed_tokens_fn leaves rows \[0, 1, 2\] no token"):
        model.generate(**inputs, prefix_allowed_tokens_fn=lambda row, ids: [config.latent_end_token_id])


def test_prompts_padded_on_the_right_are_refused(model, processor):
    inputs = encode(processor, PROMPTS, "right", prompt_only=True)
    with pytest.raises(ValueError, match=r"rows \[0, 2\] end in padding.*padding_side=\"left\""):
        model.generate(**inputs, max_new_tokens=2)


def test_help_shows_the_arguments_for_latents():
    parameters = inspect.signature(ILVRForConditionalGeneration.generate).parameters
    assert {"output_latents", "latent_intervention", "jacobi_iterations"} <= parameters.keys()
    parameters = inspect.signature(ILVRForConditionalGeneration.forward).parameters
    assert {"jacobi_iterations", "jacobi_gradient_iterations", "min_chunks", "attention_rule"} <= parameters.keys()


# --------------------------------------------------------------------------------------------------- spans of a prompt


def half_span(model, processor):
    """A prompt that ends within a span, and the same with the whole answer, in which one more span is generated."""
    prompt = encode(processor, PROMPTS[:1], prompt_only=True)
    start, pad = model.config.latent_start_token_id, model.config.latent_pad_token_id
    ids = torch.cat([prompt["input_ids"], torch.tensor([[start, pad]])], 1)
    if "mm_token_type_ids" in prompt:
        prompt["mm_token_type_ids"] = torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, 2))
    return {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_half_span_is_completed_and_mixed_with_no_other(model, processor):
    prompt = half_span(model, processor)
    places = set()

    def record(latents, span, index):
        places.add((int(span), int(index)))
        return latents

    output = generate(model, prompt, [(5,)], latent_intervention=record, **LATENTS)
    words, pad = output.sequences[0, prompt["input_ids"].shape[1] - 2 :].tolist(), model.config.latent_pad_token_id
    assert words[1:5] == [pad, pad, pad, model.config.latent_end_token_id]
    whole = {**prompt, "input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    whole.pop("mm_token_type_ids", None)
    predicted = model(**whole).predicted_latents
    assert predicted.shape[1] == 2
    torch.testing.assert_close(output.latents[0], predicted[0, 1:], rtol=1e-4, atol=1e-4)
    assert {place for place in places if place[1] >= 0} == {(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}


def test_a_half_span_cannot_be_computed_in_parallel(model, processor):
    with pytest.raises(ValueError, match=r"prompts of rows \[0\] end within a latent span"):
        generate(model, half_span(model, processor), [(5,)], jacobi_iterations=1)


# -------------------------------------------------------------------------------------------------- caches of a caller


def test_a_cache_that_was_reset_or_cropped_has_no_feedback(model, processor):
    inputs = encode(processor, PROMPTS[:1], prompt_only=True)
    latent = torch.tensor([[model.config.latent_pad_token_id]])
    cache = model(**inputs).past_key_values
    assert cache.latent_spans.length == inputs["input_ids"].shape[1] and cache.latent_spans.feedback is not None
    cache.crop(-1)
    with pytest.raises(ValueError, match="starts inside a latent span"):
        model(input_ids=latent, past_key_values=cache)
    cache = model(**inputs).past_key_values
    cache.reset()
    with pytest.raises(ValueError, match="starts inside a latent span"):
        model(input_ids=latent, past_key_values=cache)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_the_names_of_old_and_new_transformers(model, processor, name):
    inputs = encode(processor, PROMPTS[:1], prompt_only=True)
    expected = model(**inputs).logits[:, -1:]
    *before, last = inputs["input_ids"].split([inputs["input_ids"].shape[1] - 1, 1], dim=1)
    shorter = {k: v[:, :-1] if k in ("attention_mask", "mm_token_type_ids") else v for k, v in inputs.items()}
    cache = model(**{**shorter, "input_ids": before[0]})[CACHE]
    found = model(input_ids=last, **{name: cache})
    assert found[CACHE] is cache and cache.get_seq_length() == inputs["input_ids"].shape[1]
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)


def test_a_step_compiles_as_one_graph_for_all_phases(model, inputs):
    """Without a break, and once: nothing that changes from step to step is a constant of the graph.

    No run is given what the one before has returned: recorded as a CUDA graph, it would overwrite it while it reads.
    """
    graphs, returned = [], []

    def backend(graph, example_inputs):
        def run(*tensors):
            written = {tensor.untyped_storage().data_ptr() for tensor in returned}
            assert not written & {tensor.untyped_storage().data_ptr() for tensor in tensors if torch.is_tensor(tensor)}
            returned[:] = outputs = graph.forward(*tensors)
            return outputs

        graphs.append(graph)
        return run

    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=backend)
    config._compile_all_devices = True  # transformers compiles on accelerators alone, else
    found = generate(model, inputs, cache_implementation="static", compile_config=config)
    assert found.equal(generate(model, inputs)) and len(graphs) == 1 and returned


def test_a_static_cache_that_is_used_again_starts_anew(model, inputs):
    expected = generate(model, inputs)
    cache = generate(model, inputs, cache_implementation="static", return_dict_in_generate=True).past_key_values
    cache.reset()
    assert generate(model, inputs, past_key_values=cache).equal(expected)


def test_a_latent_given_for_one_column_of_a_cache_is_put_in(model, processor):
    """As when a rollout is replayed column by column."""
    inputs = encode(processor, PROMPTS[:1], prompt_only=True)
    latent = torch.tensor([[model.config.latent_pad_token_id]])
    given = torch.full((1, 1, LATENT_SIZE, 32), 0.5)
    cache = model(**inputs).past_key_values
    outputs = model(input_ids=latent, past_key_values=cache, latent_values=given)
    assert outputs.latent_inputs[0, 0, 0].equal(given[0, 0, 0])


def test_beams_take_their_state_along(model):
    cache = DynamicCache()
    cache.update(torch.zeros(3, 1, 2, 4), torch.zeros(3, 1, 2, 4), 0)
    state = SpanState.of(cache)
    assert state.length == 2 and SpanState.of(cache) is state
    state.feedback, state.plan = torch.arange(3.0).view(3, 1), torch.arange(3.0).view(3, 1, 1)
    state.ahead, flags = torch.arange(3.0).view(3, 1, 1), torch.eye(3, 2) > 0
    state.columns = ColumnFacts(flags, flags, latent_size=2)
    model._reorder_cache(cache, torch.tensor([2, 0, 0]))
    for value in (state.feedback, state.plan, state.ahead):
        assert value.flatten().tolist() == [2, 0, 0]
    assert state.columns.is_image.tolist() == [[False, False], [True, False], [True, False]]


def test_pipeline(model, processor):
    """Answers of the pipeline, one by one and in a batch of prompts of unequal length, are those of `generate`."""
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    chats = []
    for sample in PROMPTS:
        image = {"type": "image", "image": sample["images"][0]}
        chats.append([{"role": "user", "content": [image, sample["messages"][0]["content"][1]]}])
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = []
    for sample in PROMPTS:
        inputs = encode(processor, [sample], prompt_only=True)
        ids = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(ids, skip_special_tokens=True))
    for batch_size in (1, 3):
        answers = [answer[0]["generated_text"][-1] for answer in pipe(text=chats, batch_size=batch_size, **settings)]
        assert answers == [{"role": "assistant", "content": text} for text in expected]


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


def test_latents_of_a_generation_can_be_replayed(model, processor):
    """What was generated, forced in again: the same logits. Forced ids stand between a start and the next word."""
    prompts = encode(processor, PROMPTS, "left", prompt_only=True)
    width = prompts["input_ids"].shape[1]
    output = generate(model, prompts, return_dict_in_generate=True, output_latents=True, output_logits=True)
    values, mask = pad_spans(output.latents)
    assert mask.any(-1).sum(1).tolist() == [len(steps) for steps in STEPS] and not values[~mask].any()
    new = output.sequences.shape[1] - width
    whole = {**prompts, "input_ids": output.sequences}
    whole["attention_mask"] = torch.nn.functional.pad(prompts["attention_mask"], (0, new), value=1)
    if "mm_token_type_ids" in prompts:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(prompts["mm_token_type_ids"], (0, new))
    replayed = model(**whole, latent_values=values, latent_mask=mask).logits[:, width - 1 : -1]
    torch.testing.assert_close(replayed, torch.stack(output.logits, dim=1), rtol=1e-4, atol=1e-4)
    forced = is_forced(output.sequences[:, width:], model.config)
    assert forced.sum(1).tolist() == [(LATENT_SIZE + 1) * len(steps) for steps in STEPS]
