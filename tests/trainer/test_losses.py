"""Loss parts against numbers worked out by hand."""

import math

import pytest
import torch

from ilvr.trainer.losses import alignment_loss, infonce_loss, mean_pairwise_cosine, token_loss


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


def test_infonce_by_hand():
    """One latent between its target (cosine 0.8) and another candidate (0.6), and a second row's target (-1)."""
    latents = torch.tensor([[[[0.8, 0.6]]], [[[0.0, 2.0]]]])  # (B 2, S 1, K 1, D 2)
    candidates = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]], [[[-0.8, -0.6], [9.0, 9.0]]]])
    exists = torch.tensor([[[True, True]], [[True, False]]])
    indices = torch.zeros(2, 1, 1, dtype=torch.long)
    targets, mask = candidates[:, :, :1], torch.ones(2, 1, 1, dtype=torch.bool)
    loss = infonce_loss(latents, targets, mask, candidates, exists, indices, temperature=0.5)
    first = math.log(1 + math.exp((0.6 - 0.8) / 0.5) + math.exp((-1.0 - 0.8) / 0.5))
    second = math.log(1 + math.exp((0.0 + 0.6) / 0.5))  # its target has cosine -0.6, the other row's 0
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-5)
    mask[1] = False  # a row without targets counts neither as a sample nor as a negative
    alone = infonce_loss(latents, targets, mask, candidates, exists, indices, temperature=0.5)
    assert alone.item() == pytest.approx(math.log(1 + math.exp((0.6 - 0.8) / 0.5)), rel=1e-5)


def test_what_all_features_share_satisfies_a_cosine_and_not_infonce():
    common = torch.tensor([10.0, 0.0, 0.0])
    candidates = (common + torch.eye(3)[1:]).view(1, 1, 2, 3)
    latents, indices = common.view(1, 1, 1, 3), torch.zeros(1, 1, 1, dtype=torch.long)
    mask, exists = torch.ones(1, 1, 1, dtype=torch.bool), torch.ones(1, 1, 2, dtype=torch.bool)
    assert alignment_loss(latents, candidates[:, :, :1], mask)[0] < 0.01
    chosen = (candidates[:, :, :1], mask, candidates, exists, indices)
    assert infonce_loss(latents, *chosen, temperature=0.1).item() == pytest.approx(math.log(2))
