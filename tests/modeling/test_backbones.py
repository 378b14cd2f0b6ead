"""The contract of a backbone, for those that the whole suite does not run on, and what is refused."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from backbones import BUILDERS, FULLY_TESTED
from helpers import (
    LATENT_SIZE,
    SPAN_SAMPLES,
    encode,
    generate,
    gradients,
    largest_difference,
    make_trainer,
    next_token_loss,
    prefix_recompute,
)

from ilvr import ILVRProcessor
from ilvr.latent_cache import ChunkCache


BACKBONES = [name for name in BUILDERS if name not in FULLY_TESTED]
PROMPTS = [SPAN_SAMPLES[0], SPAN_SAMPLES[1]]


# `rescale` divides by the norm of a state, and what linear attention sums up in fp32 is off by more.
@pytest.mark.parametrize(
    ("checkpointing", "latent_head", "bound"),
    [(False, "identity", 1e-4), (True, "identity", 1e-4), (False, "rescale", 3e-4)],
)
def test_walk_has_the_gradients_of_prefix_recompute(model, processor, checkpointing, latent_head, bound):
    model.config.latent_head = latent_head
    inputs = encode(processor, SPAN_SAMPLES, "left")
    model.train()
    expected = gradients(model, next_token_loss(prefix_recompute(model, inputs), inputs))
    if checkpointing:
        model.activation_checkpointing_enable()
    found = gradients(model, next_token_loss(model(**inputs).logits, inputs))
    assert largest_difference(found, expected) < bound


@pytest.mark.parametrize("way", [{"jacobi_iterations": 2 * LATENT_SIZE}, {"fixed_point_tolerance": 0.0}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_latents_at_once_have_the_gradients_of_the_walk(model, processor, checkpointing, way):
    inputs = encode(processor, SPAN_SAMPLES, "left")
    model.train()
    expected = gradients(model, next_token_loss(model(**inputs).logits, inputs))
    if checkpointing:
        model.activation_checkpointing_enable()
    outputs = model(**inputs, **way)
    found = gradients(model, next_token_loss(outputs.logits, inputs))
    assert largest_difference(found, expected) < 3e-4  # linear attention: 1.03e-4 on some processors


def test_generation_is_exact_in_batches(model, processor):
    inputs = encode(processor, PROMPTS, "left", prompt_only=True)
    steps = [(1, 9), (3,)]
    expected = generate(model, inputs, steps)
    assert generate(model, inputs, steps, use_cache=False).equal(expected)
    for row, prompt in enumerate(PROMPTS):
        single = encode(processor, [prompt], prompt_only=True)
        ids = generate(model, single, steps[row : row + 1])[:, single["input_ids"].shape[1] :]
        assert ids[0].equal(expected[row, inputs["input_ids"].shape[1] :])


def test_prefill_in_chunks_is_exact(model, processor):
    """An image may lie in a later chunk, and its tokens may see each other in both directions."""
    image = {"type": "image", "image": SPAN_SAMPLES[0]["images"][0]}
    parts = [{"type": "text", "text": "Plan a path to the goal"}, image]
    content = [{"role": "user", "content": [*parts, {"type": "text", "text": "Go"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([content], **options)
    images = (inputs["input_ids"] == model.config.image_token_id)[0].nonzero().flatten()
    size = int(images[0]) if images[-1] < 2 * images[0] else inputs["input_ids"].shape[1] - 3
    logits = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4}
    whole, chunked = (model.generate(**inputs, **logits, **more) for more in ({}, {"prefill_chunk_size": size}))
    torch.testing.assert_close(torch.stack(chunked.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)


def test_generation_of_whole_spans_is_exact_or_refused(model, processor, backbone_name):
    inputs = encode(processor, PROMPTS, "left", prompt_only=True)
    options = {"jacobi_iterations": LATENT_SIZE - 1, "return_dict_in_generate": True, "output_latents": True}
    steps = [(1, 9)] * 2
    if backbone_name == "qwen3_5":  # the states of linear attention cannot be cut back
        with pytest.raises(ValueError, match="attention layers alone"):
            generate(model, inputs, steps, **options)
        return
    found, expected = (
        generate(model, inputs, steps, **options),
        generate(model, inputs, steps, **{**options, "jacobi_iterations": None}),
    )
    assert found.sequences.equal(expected.sequences)
    for one, other in zip(found.latents, expected.latents, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_assistant_words_are_marked(processor):
    """What follows the generation prompt, and nothing else, is the assistant's."""
    user, assistant = SPAN_SAMPLES[0]["messages"]
    parts = [{"type": "image", "image": SPAN_SAMPLES[0]["images"][0]}, *user["content"][1:]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template([{**user, "content": parts}], add_generation_prompt=True, **options)
    whole = processor.apply_chat_template(
        [{**user, "content": parts}, assistant], return_assistant_tokens_mask=True, **options
    )
    mask = whole["assistant_masks"][0].bool()
    length = prompt["input_ids"].shape[1]
    assert whole["input_ids"][0, :length].equal(prompt["input_ids"][0])
    assert not mask[:length].any() and mask[length:].sum() >= len(mask) - length - 1  # but for a line's end


@pytest.mark.parametrize("stage", [1, 2])
def test_both_stages_take_a_step(model, processor, tmp_path, stage):
    trainer = make_trainer(model, processor, tmp_path, stage=stage, max_steps=1, per_device_train_batch_size=1)
    before = copy.deepcopy(model.get_input_embeddings().weight)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0 and not model.get_input_embeddings().weight.equal(before)


@pytest.mark.parametrize("backbone_name", ["qwen3_5"], indirect=True)
def test_batches_of_linear_attention_are_refused(model, processor, tmp_path):
    with pytest.raises(ValueError, match="A batch of 4 aligns .* to 1 and accumulate"):
        make_trainer(model, processor, tmp_path, stage=2, per_device_train_batch_size=4)


def test_layers_without_an_exact_walk_are_refused():
    config = SimpleNamespace(model_type="jamba", layer_types=["mamba", "full_attention"], num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"\(jamba\) has layers of type \['mamba'\]"):
        ChunkCache.of_size(config, 8)


def test_an_unknown_chat_format_is_refused(backbone_dir, tmp_path):
    folder = shutil.copytree(backbone_dir, tmp_path / "other")
    file = next(folder.glob("chat_template.jinja"))
    file.write_text(
        "{% for m in messages %}<<{{ m.role }}>>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="none of those known here"):
        ILVRProcessor.from_backbone(folder)
