"""In which order samples are drawn: those alike in spans and length together, or those of a level of difficulty."""

import random
from bisect import bisect_left

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


class LadderSampler(Sampler):
    """
    Draws from the present level of difficulty, and a share from the levels before it, with replacement.

    Which sample draw number n is follows from n, the seed and the level alone, and a level holds from a draw on: what
    was fetched ahead of a step stays as it is, and a resumed run draws the same.

    Args:
        levels (`list[int]`): of each sample, from 0.
        rehearsal (`float`): share of draws from earlier levels.
        seed (`int`).
    """

    def __init__(self, levels: list[int], *, rehearsal: float, seed: int) -> None:
        self.order = sorted(range(len(levels)), key=levels.__getitem__)
        ordered = sorted(levels)
        self.starts = [bisect_left(ordered, level) for level in range(ordered[-1] + 2)]  # of levels, and the end
        self.rehearsal, self.seed = rehearsal, seed
        self.epoch, self.drawn = 0, 0
        self.history = [[0, 0]]  # number of the first draw, level

    def __len__(self) -> int:
        return len(self.order)

    @property
    def level(self) -> int:
        return self.history[-1][1]

    def move_to(self, level: int) -> None:
        """Draws from `level` from the next draw on."""
        self.history.append([self.drawn, level])

    def __iter__(self):
        for number in range(self.epoch * len(self), (self.epoch + 1) * len(self)):
            self.drawn = number + 1
            yield self.draw(number)

    def draw(self, number: int) -> int:
        """The index of draw `number`, counted over all epochs."""
        level = next(level for first, level in reversed(self.history) if first <= number)
        rng = random.Random(f"{self.seed}-{number}")
        start, end = self.starts[level], self.starts[level + 1]
        if level > 0 and rng.random() < self.rehearsal:
            start, end = 0, start
        return self.order[rng.randrange(start, end)]
