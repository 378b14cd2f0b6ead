"""Batches of samples that are alike."""

import random
from itertools import pairwise

from helpers import make_trainer

from ilvr.trainer.inputs.sampler import SpanGroupedSampler


def test_grouped_batches_are_alike_and_in_random_order():
    rng = random.Random(0)
    num_spans = [rng.randint(0, 5) for _ in range(403)]
    lengths = [rng.randint(50, 90) for _ in range(403)]
    sampler = SpanGroupedSampler(num_spans, lengths, batch_size=4, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(403)) and len(sampler) == 403
    batches = [order[i : i + 4] for i in range(0, 403, 4)]
    spread = sum(max(num_spans[i] for i in b) - min(num_spans[i] for i in b) for b in batches[:-1])
    assert spread < 0.2 * len(batches)
    firsts = [num_spans[b[0]] for b in batches[:-1]]
    assert sum(a < b for a, b in pairwise(firsts)) > 20 and sum(a > b for a, b in pairwise(firsts)) > 20
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_grouped_training_draws_another_order_each_epoch(model, processor, tmp_path):
    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        max_steps=4,
        train_sampling_strategy="group_by_length",
        learning_rate=0.0,
        data_seed=0,
    )
    seen = []
    collate = trainer.data_collator.torch_call
    trainer.data_collator.torch_call = lambda rows: (
        seen.append([len(row["input_ids"]) for row in rows]) or collate(rows)
    )
    trainer.train()
    sampler = trainer.get_train_dataloader().batch_sampler.sampler
    assert isinstance(sampler, SpanGroupedSampler) and sampler.seed == 0
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        lengths = [trainer.train_dataset[i]["length"] for i in sampler]
        epochs += [lengths[:4], lengths[4:]]
    assert seen[1:5] == epochs  # behind the samples that the norm of targets is measured on
