"""The processor: latent spans in the template, what is refused, copies of it."""

import copy
import pickle

import pytest
from helpers import LATENT_SIZE, SPAN_SAMPLES, encode, every_backbone, make_sample
from transformers import AutoProcessor

from ilvr import ILVRProcessor


def turns(content, role="user") -> list[dict]:
    return [{"role": role, "content": content}]


@every_backbone
def test_prompts_of_a_batch_end_together(processor, tmp_path, backbone_name):
    """Left padding is the default of a new processor and of a saved one: what is generated follows the prompt."""
    processor.save_pretrained(tmp_path)
    for found in (processor, ILVRProcessor.from_pretrained(tmp_path)):
        assert found.tokenizer.padding_side == "left"
        prompts = [turns([{"type": "text", "text": text}]) for text in ("Plan", "Plan a path to the goal")]
        batch = found.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_makes_the_same(processor, copied):
    found, expected = (encode(p, SPAN_SAMPLES, "left") for p in (copied(processor), processor))
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def test_a_template_with_another_number_of_pads_is_refused(processor, backbone_dir):
    template = processor.chat_template.replace(f"LATENT_SIZE = {LATENT_SIZE}", f"LATENT_SIZE = {LATENT_SIZE - 1}")
    assert template != processor.chat_template
    with pytest.raises(ValueError, match=r"as \[1, 2, 1\] start, pad and end tokens; .* it must be \[1, 3, 1\]"):
        ILVRProcessor.from_backbone(backbone_dir, latent_size=LATENT_SIZE, chat_template=template)


def test_a_template_without_marks_is_refused(processor, backbone_dir):
    template = processor.chat_template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    with pytest.raises(ValueError, match="does not mark the assistant's words"):
        ILVRProcessor.from_backbone(backbone_dir, latent_size=LATENT_SIZE, chat_template=template)


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("texts", [["Go <|latent_start|>"], ["Go <|latent_", "start|>"], ["<|latent", "_pad", "|>"]])
def test_latent_tokens_in_texts_are_refused(processor, role, texts):
    parts = [{"type": "text", "text": text} for text in texts]
    for content in (parts, "".join(texts)):
        with pytest.raises(ValueError, match=f"The {role} text .* holds <"):
            processor.apply_chat_template(turns(content, role))


def test_a_marker_that_an_image_parts_is_none(processor):
    sample = make_sample(["Up"])
    image = {"type": "image", "image": sample["images"][0]}
    parts = [{"type": "text", "text": "<|latent_"}, image, {"type": "text", "text": "pad|>"}]
    ids = processor.apply_chat_template(turns(parts), tokenize=True, return_dict=True)["input_ids"][0]
    assert not set(processor.latent_token_ids) & set(ids)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "tool", "content": "x"}, "Unknown role 'tool'"),
        ({"role": None, "content": "x"}, "Unknown role None"),
        ({"role": "user", "content": None}, "must be a text or a list of parts, got None"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "must be a text with its words or an image"),
        ({"role": "user", "content": [{"type": "video"}]}, "must be a text with its words or an image"),
        ({"role": "user", "content": [{"type": None, "text": "x"}]}, "must be a text with its words or an image"),
    ],
)
def test_turns_that_would_lose_something_are_refused(processor, message, problem):
    with pytest.raises(ValueError, match=problem):
        processor.apply_chat_template([message])


@pytest.mark.parametrize("name", ["Trainer", "TextIteratorStreamer", "nothing", "AutoProcessor"])
def test_a_processor_class_that_is_none_is_refused(processor, name):
    with pytest.raises(ValueError, match=f"names '{name}', which is no processor"):
        ILVRProcessor(processor.image_processor, processor.tokenizer, backbone_processor={"processor_class": name})


def test_a_tokenizer_without_latent_tokens_is_refused(backbone_dir):
    """A plain backbone, loaded as if it were a checkpoint of this library: its spans would be spelt out in letters."""
    with pytest.raises(ValueError, match=r"no <\|latent_start\|>, .* with `ILVRProcessor.from_backbone`"):
        ILVRProcessor.from_pretrained(backbone_dir)


def test_what_is_saved_is_found_by_the_auto_class(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), ILVRProcessor)
