"""Statistics, against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from ilvr.evaluation.probes import Rate, linear_probe, mean_norm, nearest_patches
from ilvr.evaluation.statistics import holm, mcnemar, paired_difference


def pairs(both=0, first=0, second=0, neither=0):
    """Answers right of two runs, with so many samples of each kind."""
    kinds = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    return [a for a, _ in kinds], [b for _, b in kinds]


@pytest.mark.parametrize(
    "first, second, p",
    [
        (5, 1, 2 * (1 + 6) / 64),
        (0, 6, 2 / 64),
        (2, 2, 1.0),  # 2 * (1 + 4 + 6) / 16 is more than 1
        (0, 0, 1.0),
        (1, 0, 1.0),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar(first, second, p):
    assert mcnemar(*pairs(both=3, first=first, second=second, neither=4)) == pytest.approx(p)


def test_mcnemar_of_many_samples():
    assert 0 < mcnemar(*pairs(first=1500, second=500)) < 1e-100


def test_holm():
    # Times 3, 2 and 1 by rank, none below the one before: Holm's own procedure.
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.5, "b": 0.6}) == pytest.approx({"a": 1.0, "b": 1.0})
    assert list(holm({"z": 0.2, "a": 0.001})) == ["z", "a"] and holm({}) == {}


def test_paired_difference():
    assert paired_difference([True, True], [False, False]) == (1, 1, 1)
    # Of two samples with differences 1 and 0, resamples have mean 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    assert paired_difference([True, True], [False, True]) == (0.5, 0, 1)
    found = paired_difference(*pairs(both=30, first=40, second=10, neither=20))
    # The bootstrap's standard error is sqrt((p + q - (p - q)^2) / n) = sqrt((0.5 - 0.09) / 100).
    half = 1.96 * (0.41 / 100) ** 0.5
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - half, abs=0.011) and found.high == pytest.approx(0.3 + half, abs=0.011)
    assert found == paired_difference(*pairs(both=30, first=40, second=10, neither=20))


def test_the_bootstrap_draws_samples():
    """Counts of three kinds have the distribution of the plain bootstrap."""
    first, second = pairs(both=5, first=7, second=3, neither=5)
    differences = np.array(first, dtype=int) - np.array(second, dtype=int)
    means = np.random.default_rng(1).choice(differences, size=(20_000, 20)).mean(1)
    found = paired_difference(first, second)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.051)


@pytest.mark.parametrize("statistic", [mcnemar, paired_difference])
def test_samples_that_do_not_pair(statistic):
    with pytest.raises(ValueError, match="got 2 and 1"):
        statistic([True, False], [True])
    with pytest.raises(ValueError, match="got 0 and 0"):
        statistic([], [])


def test_rate():
    assert Rate.of(3, 4).value == 0.75 and (Rate.of(0, 0).low, Rate.of(0, 0).high) == (0, 1)
    assert str(Rate.of(1, 2)) == "50.0 % (9.5 – 90.5)"


def test_a_probe_reads_what_is_there():
    """Labels that follow from the features, of samples with four spans each; and labels that do not."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.arange(100).repeat_interleave(4)
    labels = torch.randint(3, (400,), generator=generator)
    directions = torch.randn(3, 8, generator=generator)
    features = directions[labels] + 0.1 * torch.randn(400, 8, generator=generator) + 50  # far from 0
    probe = linear_probe(features, labels, samples)
    assert probe.accuracy.value == 1 and probe.accuracy.count == probe.trained_on == 200 and probe.classes == 3
    shuffled = labels[torch.randperm(400, generator=generator)]
    blind = linear_probe(features, shuffled, samples)
    assert blind.accuracy.value < 0.45 and 0.25 < blind.baseline < 0.45
    with pytest.raises(ValueError, match="got 1. Add samples"):
        linear_probe(features, labels, torch.zeros(400).long())


def test_a_probe_is_not_tested_on_what_it_learned():
    """Features that only name their sample say nothing of another one."""
    samples = torch.arange(20).repeat_interleave(5)
    features = torch.eye(20)[samples]
    labels = torch.randint(2, (20,), generator=torch.Generator().manual_seed(3))[samples]
    assert linear_probe(features, labels, samples).accuracy.value < 0.8


def test_nearest_patches_and_norms():
    picture = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    assert nearest_patches(torch.tensor([[0.1, 5.0], [-3, 1]]), picture).tolist() == [1, 2]
    assert mean_norm([torch.tensor([[[3.0, 4]]]), torch.zeros(0, 1, 2), torch.tensor([[0.0, 1]])]) == 3
    assert mean_norm([]) is None
