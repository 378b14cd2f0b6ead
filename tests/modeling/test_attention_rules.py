"""One rule of attention in all forwards: plain, with given latents, the walk, in parallel, and `generate`."""

import re
from pathlib import Path

import pytest
import torch
from helpers import (
    LATENT_SIZE,
    PROMPTS,
    SPAN_SAMPLES,
    STEPS,
    encode,
    every_backbone,
    generate,
    gradients,
    largest_difference,
    make_sample,
    next_token_loss,
)

from ilvr.latent_attention import hide_images_after_first_span
from ilvr.latent_spans import ColumnFacts


BACKBONES = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3")
RULE = {"attention_rule": hide_images_after_first_span}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


def hand_made_masks(model, inputs, rows=None):
    """For each type of layer, who sees whom, (B, 1, T, T), written as loops over all pairs."""
    config, ids = model.config, inputs["input_ids"]
    text, (batch_size, length) = config.get_text_config(), ids.shape
    bidirectional = text.model_type == "gemma3_text"
    window = text.sliding_window if bidirectional else length
    masks = torch.zeros(2, batch_size, 1, length, length, dtype=torch.bool)
    for row in range(batch_size):
        is_image = (ids[row] == config.image_token_id).tolist()
        ends = [c for c in range(length) if ids[row, c] == config.latent_end_token_id]
        first_end = ends[0] if ends and (rows is None or rows[row]) else length
        image = [None] * length  # the first column of the image that a column belongs to
        for c in range(length):
            if is_image[c]:
                image[c] = image[c - 1] if c and is_image[c - 1] else c
        for query in range(length):
            for key in range(length):
                same = bidirectional and image[query] is not None and image[query] == image[key]
                seen = (key <= query or same) and bool(inputs["attention_mask"][row, key])
                seen = seen and not (query >= first_end and is_image[key] and key < first_end)
                masks[0, row, 0, query, key] = seen
                masks[1, row, 0, query, key] = seen and abs(query - key) < window
    if bidirectional:
        return {"full_attention": masks[0], "sliding_attention": masks[1]}
    return masks[0]


def encoded(model, inputs, rows=None):
    """The core's inputs with hand-made masks."""
    encoded = model.model._encode(inputs["input_ids"], {k: v for k, v in inputs.items() if k != "input_ids"})
    return {**encoded, "attention_mask": hand_made_masks(model, inputs, rows)}


def recompute(model, inputs, rows=None):
    """The published algorithm: for each latent column, a forward pass over everything, with hand-made masks."""
    is_latent, others = inputs["input_ids"] == model.config.latent_pad_token_id, encoded(model, inputs, rows)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for column in is_latent.any(0).nonzero().flatten().tolist():
        before = model.model.core(inputs_embeds=embeds, **others).last_hidden_state[:, column - 1]
        latent = torch.where(is_latent[:, column, None], model.model.latent_head(before), embeds[:, column])
        embeds = torch.cat([embeds[:, :column], latent[:, None], embeds[:, column + 1 :]], dim=1)
    return model.get_output_embeddings()(model.model.core(inputs_embeds=embeds, **others).last_hidden_state)


def assert_close(found, expected, inputs):
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


def test_the_rule_of_the_docs_by_hand():
    """word, span, word, span; K = 2."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "def hide_earlier_spans" in b)
    exec(block, names := {})
    is_latent = torch.tensor([[0, 1, 1, 0, 1, 1]]).bool()
    rule = names["hide_earlier_spans"](ColumnFacts(torch.zeros_like(is_latent), is_latent, latent_size=2))
    places = torch.arange(6)
    hidden = ~rule(torch.tensor(0), torch.tensor(0), places[:, None], places[None])
    assert {(q, k) for q, k in hidden.nonzero().tolist() if k < q} == {(4, 1), (4, 2), (5, 1), (5, 2)}


def test_facts_and_the_rule_by_hand():
    """image, word, span, word, image, word, span, word; K = 2."""
    columns = torch.tensor([[1, 0, 2, 2, 0, 1, 0, 2, 2, 0]])
    facts = ColumnFacts(columns == 1, columns == 2, latent_size=2)
    assert facts.span.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1, 2]]
    rule = hide_images_after_first_span(facts)
    pairs = torch.arange(10)
    seen = rule(torch.zeros(1, dtype=torch.long), None, pairs[:, None], pairs[None])
    hidden = [(query, key) for query, key in (~seen).nonzero().tolist()]
    assert hidden == [(query, 0) for query in range(4, 10)]


def test_given_latents_are_a_plain_forward_with_a_mask(model, processor):
    inputs = encode(processor, SPAN_SAMPLES, "left")
    values = torch.randn(2, 2, LATENT_SIZE, 32, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([False, True])
    is_latent = inputs["input_ids"] == model.config.latent_pad_token_id
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    embeds[is_latent] = values.flatten(0, 2)
    free = model(**inputs, latent_values=values).logits
    for given in (None, rows):
        hidden = model.model.core(inputs_embeds=embeds, **encoded(model, inputs, given)).last_hidden_state
        found = model(**inputs, latent_values=values, **RULE, attention_rule_rows=given)
        assert_close(found.logits, model.get_output_embeddings()(hidden), inputs)
        # The control: the rule makes a difference, in its rows alone.
        differs = [(one - other).abs().max() > 1e-3 for one, other in zip(found.logits, free)]
        assert differs == ([True, True] if given is None else given.tolist())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_walk_is_prefix_recompute_with_a_mask(model, processor, checkpointing):
    inputs = encode(processor, SPAN_SAMPLES, "left")
    rows = torch.tensor([True, False])
    model.train()
    logits = recompute(model, inputs, rows)
    expected = gradients(model, next_token_loss(logits, inputs))
    if checkpointing:
        model.activation_checkpointing_enable()
    found = model(**inputs, **RULE, attention_rule_rows=rows).logits
    assert_close(found, logits, inputs)
    assert largest_difference(gradients(model, next_token_loss(found, inputs)), expected) < 1e-4
    free = gradients(model, next_token_loss(model(**inputs).logits, inputs))
    assert largest_difference(free, expected) > 1e-3  # the control


@pytest.mark.parametrize("checkpointing", [False, True])
def test_enough_iterations_are_the_walk(model, processor, checkpointing):
    inputs = encode(processor, SPAN_SAMPLES, "left")
    model.train()
    walked = model(**inputs, **RULE).logits
    expected = gradients(model, next_token_loss(walked, inputs))
    if checkpointing:
        model.activation_checkpointing_enable()
    found = model(**inputs, **RULE, jacobi_iterations=2 * LATENT_SIZE).logits
    assert_close(found, walked, inputs)
    assert largest_difference(gradients(model, next_token_loss(found, inputs)), expected) < 1e-4


@every_backbone
def test_generation_with_a_cache_is_the_one_without(model, processor, backbone_name):
    """In batches with rows that the rule does not hold for, and beams; and it is the forward over the result."""
    inputs = encode(processor, PROMPTS, "left", prompt_only=True)
    rows = torch.tensor([True, False, True])
    rule = {**RULE, "attention_rule_rows": rows, **LOGITS}
    if backbone_name == "qwen3_5":
        with pytest.raises(ValueError, match=r"layers of type \['linear_attention'\].* attention_rule can hide none"):
            generate(model, inputs, **rule)
        return
    found, uncached = generate(model, inputs, **rule), generate(model, inputs, use_cache=False, **rule)
    free = generate(model, inputs, **LOGITS)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)
    assert found.sequences.equal(uncached.sequences)
    beams = [generate(model, inputs, num_beams=2, use_cache=cached, **rule) for cached in (True, False)]
    assert beams[0].sequences.equal(beams[1].sequences)
    torch.testing.assert_close(beams[0].sequences_scores, beams[1].sequences_scores, rtol=1e-4, atol=1e-4)

    width, new = inputs["input_ids"].shape[1], len(found.logits)
    whole = {**inputs, "input_ids": found.sequences}
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(3, new, dtype=torch.long)], 1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        whole.pop(name, None)
    logits = recompute(model, whole, rows)[:, width - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, 1), logits, rtol=1e-4, atol=1e-4)
    difference = (found.logits[-1] - free.logits[-1]).abs().amax(1)  # the third row has no span
    assert difference[0] > 1e-4 and difference[1:].max() == 0


def test_batch_is_singles_and_whole_spans_are_the_steps(model, processor):
    inputs = encode(processor, PROMPTS, "left", prompt_only=True)
    steps = [(1, 9)] * 3
    found = generate(model, inputs, steps, **RULE, **LOGITS)
    for row, prompt in enumerate(PROMPTS):
        single = encode(processor, [prompt], prompt_only=True)
        alone = generate(model, single, steps[:1], **RULE, **LOGITS)
        torch.testing.assert_close(
            torch.stack(alone.logits)[:, 0], torch.stack(found.logits)[:, row], rtol=1e-4, atol=1e-4
        )
    for starts in (steps, STEPS):
        expected = generate(model, inputs, starts, **RULE, **LOGITS)
        parallel = generate(model, inputs, starts, jacobi_iterations=LATENT_SIZE - 1, **RULE, **LOGITS)
        torch.testing.assert_close(torch.stack(parallel.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def test_a_second_turn_on_the_cache_of_the_first(model, processor):
    """Prompts with spans, prefilled in chunks too; a cache that was filled without the rule is refused."""
    sample = make_sample(["Right", "Up", "Left"])
    parts = [{"type": "image", "image": sample["images"][0]}, {"type": "text", "text": "Go"}]
    turns = [
        {"role": "user", "content": parts},
        sample["messages"][1],
        {"role": "user", "content": [{"type": "text", "text": "Plan"}]},
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([turns], **options)
    expected = generate(model, inputs, [(2,)], use_cache=False, **RULE, **LOGITS)
    for kwargs in ({}, {"prefill_chunk_size": inputs["input_ids"].shape[1] - 4}):
        found = generate(model, inputs, [(2,)], **kwargs, **RULE, **LOGITS)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    free = generate(model, inputs, [(2,)], return_dict_in_generate=True)
    with pytest.raises(ValueError, match="columns and attention_rule knows of 0"):
        more = {"input_ids": free.sequences, "past_key_values": free.past_key_values}
        model.generate(**more, max_new_tokens=1, **RULE)


def test_eager_attention_follows_it_too(model, processor):
    inputs = encode(processor, SPAN_SAMPLES, "left")
    expected = model(**inputs, **RULE).logits
    model.set_attn_implementation("eager")
    assert_close(model(**inputs, **RULE).logits, expected, inputs)


def test_what_no_rule_can_reach_is_refused(model, processor):
    inputs = encode(processor, SPAN_SAMPLES, "left")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="Pass input_ids"):
        model(inputs_embeds=embeds, **RULE)
    with pytest.raises(ValueError, match=r"has shape \(3,\); the batch needs \(2,\)"):
        model(**inputs, **RULE, attention_rule_rows=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="Pass attention_rule, too"):
        model(**inputs, attention_rule_rows=torch.ones(2, dtype=torch.bool))
    prompts = encode(processor, PROMPTS, "left", prompt_only=True)
    with pytest.raises(ValueError, match="generate with a dynamic cache"):
        generate(model, prompts, cache_implementation="static", **RULE)
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes none"):
        model(**inputs, **RULE)
