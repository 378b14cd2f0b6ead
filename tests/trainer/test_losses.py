"""Loss parts against numbers worked out by hand."""

import math

import pytest
import torch

from ilvr.trainer.losses import alignment_loss, mean_pairwise_cosine, token_loss


def test_alignment_is_a_mean_of_sample_means():
    """Sample 0 has one target at cosine 0, sample 1 two at cosine 1 and 0.6, sample 2 none."""
    predicted = torch.tensor([[[1.0, 0.0], [5.0, 5.0]], [[2.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]]).unsqueeze(
        1
    )
    targets = torch.tensor([[[0.0, 3.0], [9.0, 9.0]], [[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]).unsqueeze(1)
    mask = torch.tensor([[True, False], [True, True], [False, False]]).unsqueeze(1)
    loss, cosine = alignment_loss(predicted, targets, mask)
    assert loss.item() == pytest.approx((1.0 + (0.0 + 0.4) / 2) / 2)
    assert cosine.item() == pytest.approx((0.0 + 1.0 + 0.6) / 3)


def test_alignment_noise_has_its_size_and_spares_the_logged_cosine():
    torch.manual_seed(0)
    targets = torch.ones(64, 1, 2, 128)
    mask = torch.ones(64, 1, 2, dtype=torch.bool)
    loss, cosine = alignment_loss(targets, targets, mask, noise_std=0.1)
    assert cosine.item() == pytest.approx(1.0)
    assert loss.item() == pytest.approx(1 - 1 / math.sqrt(1 + 0.1**2), rel=0.05)


def test_token_loss():
    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0], [9.0, 9.0]]])
    labels = torch.tensor([[1, 0, -100]])
    expected = math.log(2) + math.log(4 / 3)
    assert token_loss(logits, labels).item() == pytest.approx(expected / 2)
    assert token_loss(logits, labels, num_items=4).item() == pytest.approx(expected / 4)
    assert token_loss(logits, torch.full((1, 3), -100)).item() == 0.0


def test_mean_pairwise_cosine():
    assert mean_pairwise_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item() == pytest.approx(0.0)
    assert mean_pairwise_cosine(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])).item() == pytest.approx(1 / 3)
    assert mean_pairwise_cosine(torch.ones(1, 4)).item() == 0.0
