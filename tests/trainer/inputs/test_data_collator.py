"""Batches: spans in the same columns, labels, image tensors."""

import copy

import pytest
import torch
from backbones import FULLY_TESTED
from helpers import make_dataset, make_sample, make_trainer

from ilvr.trainer import LatentDataCollator
from ilvr.trainer.inputs.data_collator import align_spans
from ilvr.trainer.inputs.data_preparation import prepare_dataset


BACKBONES = FULLY_TESTED


def test_spans_of_a_batch_are_aligned(processor):
    start, pad, end = processor.latent_token_ids
    a = [1, 2, start, pad, pad, end, 3, start, pad, pad, end, 4]
    b = [1, 2, 5, start, pad, pad, end, 3, 3, 3]
    layout = align_spans([a, b], start)
    laid = [[row[i] if i >= 0 else 0 for i in columns] for row, columns in zip([a, b], layout)]
    assert laid[0] == [0, 1, 2, start, pad, pad, end, 3, 0, 0, start, pad, pad, end, 4]
    assert laid[1] == [1, 2, 5, start, pad, pad, end, 3, 3, 3, 0, 0, 0, 0, 0]


def test_collator_on_literal_tensors(processor):
    samples = [make_sample(["Right", "Up"]), make_sample(["Right Down Left", "Up", "Up"], "Plan a path")]
    prepared = prepare_dataset(make_dataset(samples), processor, stage=1)
    rows = [prepared[i] for i in range(2)]
    untouched = copy.deepcopy(rows)
    batch = LatentDataCollator(processor)(rows)
    start, pad, end = processor.latent_token_ids
    eos = processor.tokenizer.eos_token_id
    assert len(batch["helper_image_lengths"]) == 3 and len(batch["image_lengths"]) == 2
    images = batch["input_ids"] == processor.placeholder_id
    assert images.sum() == batch["image_lengths"].sum()
    starts = (batch["input_ids"] == start).nonzero().tolist()
    assert starts[0][1] == starts[1][1]  # first spans in one column
    for row in range(2):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][real], batch["shift_labels"][row][real]
        assert ids.tolist() == untouched[row]["input_ids"]
        in_turn = torch.tensor(untouched[row]["assistant_mask"])
        for t in range(len(ids) - 1):
            counted = in_turn[t + 1] and ids[t + 1] != pad
            assert labels[t] == (ids[t + 1] if counted else -100)
        assert start in labels and end in labels and pad not in labels and eos in labels
        assert (batch["shift_labels"][row][~real] == -100).all()
    assert rows[0].keys() == untouched[0].keys()  # inputs not mutated


def test_padding_between_words_does_not_change_the_loss(model, processor, tmp_path):
    """A row that is padded inside, to align its spans with another's, has the loss that it has alone."""
    samples = [make_sample(["Right", "Up", "Left"]), make_sample(["Right", "Up Down Up Down", "Left"], "Go go")]
    model.eval()
    trainer = make_trainer(model, processor, tmp_path, samples, stage=2, max_steps=1)
    rows = [trainer.train_dataset[i] for i in range(2)]
    collate = trainer.data_collator
    both = trainer.compute_loss(model, collate(rows)).item()
    counts = [sum(collate([row])["shift_labels"].ne(-100).flatten().tolist()) for row in rows]
    single = [trainer.compute_loss(model, collate([row])).item() for row in rows]
    assert (collate(rows)["attention_mask"].diff() == 1).sum() > 1  # padding inside
    assert both == pytest.approx((single[0] * counts[0] + single[1] * counts[1]) / sum(counts), rel=1e-5)
