"""Orders of samples: of like ones, so that little of a batch is padding, and one that a resumed run finds again."""

from typing import Any

import torch
from torch.utils.data import Sampler


class SpanGroupedSampler(Sampler):
    """
    Draws batches of samples with like numbers of spans and like lengths, in random order.

    The walk of stage 2 takes K columns for each span of the longest row, so spans count first. transformers' sampler
    for the same purpose hands out batches from long to short within each 50, and training from scratch learns badly
    with it; here the order of batches is random.

    Args:
        num_spans (`list[int]`), lengths (`list[int]`): of each sample.
        batch_size (`int`): samples that are drawn together.
        seed (`int`): of the order, together with the epoch.
    """

    BATCHES_SORTED_TOGETHER = 50

    def __init__(self, num_spans: list[int], lengths: list[int], *, batch_size: int, seed: int) -> None:
        self.keys = list(zip(num_spans, lengths))
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.keys)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        width = self.batch_size * self.BATCHES_SORTED_TOGETHER
        pools = [sorted(order[i : i + width], key=self.keys.__getitem__) for i in range(0, len(order), width)]
        order = [index for pool in pools for index in pool]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        num_whole = len(order) // self.batch_size  # a last, shorter one stays last
        for i in [*torch.randperm(num_whole, generator=generator).tolist(), *range(num_whole, len(batches))]:
            yield from batches[i]


class SeededByEpoch(Sampler):
    """TRL's repeated prompts in an order of their epoch.

    The order of an epoch is else what the epochs before have left of a generator, and a run that is resumed in the
    second epoch starts with the order of the first.

    Args:
        sampler ([`~trl.trainer.utils.RepeatSampler`]).
        seed (`int`): of the order, together with the epoch.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.seed + self.epoch)
        yield from self.sampler
