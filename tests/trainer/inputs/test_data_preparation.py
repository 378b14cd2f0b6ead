"""Preparation: no pixel is touched, what cannot be trained on is refused by name, several processes after torch."""

import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset, Image, IterableDataset, List
from helpers import SAMPLES, every_backbone, make_dataset, make_image, make_sample, make_trainer
from PIL import Image as PILImage

from ilvr import ILVRProcessor
from ilvr.data.token_counts import SizeTokenizer
from ilvr.trainer.inputs.data_preparation import prepare_dataset
from ilvr.trainer.inputs.sample_preparation import checked_messages


SIZES = [(32, 32), (31, 77), (200, 64), (123, 57), (640, 480)]


@every_backbone
def test_ids_and_assistant_words_are_the_processors_own(processor, backbone_name):
    """For one to three images of the user in all orders of sizes, and a helper image that is not in the text."""
    tokenizer = SizeTokenizer(processor)
    assert tokenizer.by_size
    for number in (1, 2, 3):
        for first in range(len(SIZES)):
            sizes = [SIZES[(first + i) % len(SIZES)] for i in range(number)]
            answer = [{"type": "text", "text": "Up"}, {"type": "image"}, {"type": "text", "text": "Down"}]
            question = [*({"type": "image"} for _ in sizes), {"type": "text", "text": "Plan"}]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            ids, mask = tokenizer(turns, [*sizes, (50, 40)])
            images = [{"type": "image", "image": PILImage.new("RGB", size)} for size in sizes]
            expected = processor.apply_chat_template(
                [{"role": "user", "content": [*images, question[-1]]}, turns[1]],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
            )
            assert ids == expected["input_ids"][0].tolist()
            assert mask == expected["assistant_masks"][0].bool().tolist()


def test_a_processor_whose_sizes_tell_nothing_is_measured(processor, monkeypatch):
    """Another arithmetic than its own: found out by the probe, and blank images are processed instead."""
    monkeypatch.setattr(type(processor.image_processor), "get_number_of_image_patches", lambda *args: 4)
    tokenizer = SizeTokenizer(processor)
    assert not tokenizer.by_size
    turns = make_sample(["Up", "Down"])["messages"]
    assert tokenizer(turns, [(64, 32), (32, 32)])[0].count(processor.placeholder_id) == 8


def test_no_pixel_is_touched_and_no_image_is_written_again(processor, monkeypatch):
    dataset = make_dataset(SAMPLES)
    monkeypatch.setattr(SizeTokenizer, "_agrees", lambda self: True)  # it processes blank images
    monkeypatch.setattr(PILImage.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(type(processor.image_processor), "__call__", lambda *args, **kwargs: pytest.fail("processed"))
    prepared = prepare_dataset(dataset, processor, stage=1)
    assert prepared["num_spans"] == [len(sample["images"]) - 1 for sample in SAMPLES]

    def pixels(dataset):  # where the encoded images lie
        (chunk,) = dataset.data.column("images").chunks
        return max((buffer for buffer in chunk.buffers() if buffer), key=lambda buffer: buffer.size).address

    assert pixels(prepared) == pixels(dataset)


def test_a_prepared_set_serves_both_stages(model, processor, tmp_path):
    prepared = prepare_dataset(make_dataset(), processor, stage=2)
    for stage in (1, 2):
        trainer = make_trainer(model, processor, tmp_path, dataset=prepared, stage=stage, max_steps=1)
        trainer.train()
        assert trainer.state.log_history[0]["spans_per_sample"] > 0


@pytest.mark.parametrize("latent_size", [2, 4])
@pytest.mark.parametrize("kind", ["whole", "subset", "stream"])
def test_a_set_prepared_for_another_latent_size_is_refused(processor, backbone_dir, latent_size, kind):
    """With fewer latents a span it would train on shifted targets, and say nothing."""
    other = ILVRProcessor.from_backbone(backbone_dir, latent_size=latent_size)
    prepared = prepare_dataset(make_dataset([make_sample(["Text"]), *SAMPLES]), other, stage=1)
    assert prepare_dataset(prepared, other, stage=1) is prepared
    given, number = {
        "whole": (prepared, 1),
        "subset": (prepared.select([0, 5, 2]), 1),
        "stream": (prepared.skip(1).to_iterable_dataset(), 0),
    }[kind]
    spans = 2 if kind == "subset" else 1
    found = f"Sample {number} .* its {spans} spans have {spans * latent_size} .* latent_size=3, gives {spans * 3}"
    with pytest.raises(ValueError, match=found):
        prepare_dataset(given, processor, stage=1)


def test_a_subset_in_another_order(processor):
    prepared = prepare_dataset(make_dataset().select([5, 2, 7]), processor, stage=1)
    assert prepared["num_spans"] == [len(SAMPLES[i]["images"]) - 1 for i in (5, 2, 7)]
    assert [len(row["images"]) - 1 for row in prepared] == prepared["num_spans"]


@pytest.mark.parametrize("where", ["user", "helper"])
@pytest.mark.parametrize("size", [(1, 300), (4000, 3)])
def test_images_of_a_shape_that_the_processor_refuses(processor, where, size):
    """Before training, and with the number of the sample and of the image."""
    sample = make_sample(["Up", "Down"])
    sample["images"][where == "helper"] = PILImage.new("RGB", size)
    message = rf"Sample 1 of the train data: images\[{int(where == 'helper')}\]: absolute aspect ratio .*\({size[0]}x"
    with pytest.raises(ValueError, match=message):
        prepare_dataset(make_dataset([SAMPLES[0], sample]), processor, stage=1)


def changed(**turn) -> dict:
    sample = make_sample(["Up"])
    return {"messages": [{**sample["messages"][0], **turn}, sample["messages"][1]], "images": sample["images"]}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"messages": None}, "messages: must be a list of turns, got None"),
        ({"messages": []}, "messages: must be a list of turns"),
        (changed(content=None), r"messages\[0\].content: must be a text or a list of parts"),
        (changed(role="tool"), r"messages\[0\].role: unknown role 'tool'"),
        (changed(role=None), r"messages\[0\].role: unknown role None"),
        (changed(content=[{"type": "text", "text": None}]), r"messages\[0\].content\[0\].text: must be a text"),
        (changed(content=[{"type": None, "text": "x"}]), r"content\[0\]: unknown type None"),
        (changed(content=[{"type": "video", "text": "x"}]), r"content\[0\]: unknown type 'video'"),
    ],
)
def test_conversations_that_no_reader_has_checked(sample, message):
    with pytest.raises(ValueError, match=message):
        checked_messages(sample)


@pytest.mark.parametrize("texts", [["Plan<|latent_", "start|>"], ["<|latent_p", "ad|>"], ["<|image_", "pad|>"]])
def test_tokens_cut_over_two_parts_make_no_span_and_no_image(processor, texts):
    sample = make_sample(["Up", "Down"])
    sample["messages"][0]["content"][1:] = [{"type": "text", "text": text} for text in texts]
    with pytest.raises(ValueError, match="Sample 0 of the train data: messages"):
        prepare_dataset(make_dataset([sample]), processor, stage=1)


def test_prompts_and_completions_that_are_plain_texts(model, processor, tmp_path):
    rows = Dataset.from_list([{"prompt": "Plan a path", "completion": "Right Down"}] * 4)
    prepared = prepare_dataset(rows, processor, stage=2)
    turns = [{"role": "user", "content": "Plan a path"}, {"role": "assistant", "content": "Right Down"}]
    expected = processor.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert prepared[0]["input_ids"] == list(expected[0])
    trainer = make_trainer(model, processor, tmp_path, dataset=rows, stage=2, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (SAMPLES, "must be a `datasets.Dataset` or `IterableDataset`, got list"),
        (None, "got NoneType"),
        (Dataset.from_dict({"messages": []}), "has no samples"),
        (Dataset.from_list([{"question": "?"}]), "needs a column `messages`"),
    ],
    ids=["list", "none", "empty", "columns"],
)
def test_data_that_is_no_data_set(processor, data, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset(data, processor, stage=1)


def test_streams_keep_their_samples(processor):
    stream = make_dataset().to_iterable_dataset()
    prepared = prepare_dataset(stream, processor, stage=1)
    assert isinstance(prepared, IterableDataset)
    whole = prepare_dataset(make_dataset(), processor, stage=1)
    for row, expected in zip(prepared, whole, strict=True):
        assert row["input_ids"] == expected["input_ids"] and len(row["images"]) == len(expected["images"])


AFTER_TORCH = """
import json, sys
import torch
torch.set_num_threads(2)
from helpers import LATENT_SIZE, SAMPLES, make_dataset
torch.randn(600, 600) @ torch.randn(600, 600)
from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.trainer.inputs.data_preparation import prepare_dataset
model = ILVRForConditionalGeneration.from_backbone(sys.argv[1], latent_size=LATENT_SIZE)
processor = ILVRProcessor.from_backbone(sys.argv[1], latent_size=LATENT_SIZE)
print(json.dumps(list(prepare_dataset(make_dataset(), processor, stage=1, num_proc=2)["length"])))
"""


def test_two_processes_after_torch_has_run(backbone_dir, processor):
    """A process that is forked then may not touch torch's threads: preparation does not."""
    paths = os.pathsep.join(path for path in sys.path if path.endswith(("tests", "examples")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", AFTER_TORCH, str(backbone_dir)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = prepare_dataset(make_dataset(), processor, stage=1)["length"]
    assert json.loads(done.stdout.splitlines()[-1]) == list(expected)


def test_images_by_path_stay_where_they_are(processor, tmp_path):
    make_image("red").save(tmp_path / "a.png")
    sample = make_sample(["Up"])
    rows = Dataset.from_list([{**sample, "images": [str(tmp_path / "a.png")]}])
    prepared = prepare_dataset(rows.cast_column("images", List(Image())), processor, stage=2)
    assert prepared[0]["images"] == [{"bytes": None, "path": str(tmp_path / "a.png")}]
