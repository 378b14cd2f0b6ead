"""Paired comparisons of answers to the same questions. Pure functions."""

from collections.abc import Mapping, Sequence
from math import comb
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """A difference of two rates over the same samples, with its 95 % interval."""

    value: float
    low: float
    high: float


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], *, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """The rate of `first` less that of `second`, with the percentile bootstrap interval over samples (Efron 1979).

    Args:
        first, second (`Sequence[bool]`): whether each sample's answer is right, in the same order.
        resamples (`int`, *optional*, defaults to 10,000): how often samples are drawn.
        seed (`int`, *optional*, defaults to 0): of the draws.

    Returns:
        [`Difference`]: between -1 and 1, at a level of 95 %.

    Raises:
        ValueError: if there are no samples, or they are not as many.
    """
    won, lost = _discordant(first, second)
    count = len(first)
    # A resample follows from how often it holds each of three kinds: first right alone, second right alone, no
    # difference. So their counts are drawn, and not samples.
    shares = [won / count, lost / count, max(0.0, 1 - (won + lost) / count)]
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, [0.025, 0.975])
    return Difference((won - lost) / count, float(low), float(high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value of McNemar's exact test: are the samples that only one gets right split evenly?

    Args:
        first, second (`Sequence[bool]`): whether each sample's answer is right, in the same order.

    Returns:
        `float`: 1.0 where they never differ.

    Raises:
        ValueError: if there are no samples, or they are not as many.
    """
    won, lost = _discordant(first, second)
    count = won + lost
    tail = sum(comb(count, i) for i in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**count)  # of integers, which do not overflow


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for testing several hypotheses at once (Holm 1979): each is to be compared with 0.05 itself.

    Args:
        p_values (`Mapping[str, float]`): by hypothesis.

    Returns:
        `dict[str, float]`: in the same order.
    """
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _discordant(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    """How many samples only `first` gets right, and how many only `second`."""
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"A paired comparison needs the same samples on both sides, got {len(first)} and {len(second)}. Answer "
            "the same questions."
        )
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second)]
    return pairs.count((True, False)), pairs.count((False, True))
