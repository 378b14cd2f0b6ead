"""Loss parts against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from ilvr.trainer.alignment import alignment_term
from ilvr.trainer.losses import alignment_loss, infonce_loss, mean_pairwise_cosine, token_loss
from ilvr.trainer.selection import Selection


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


def test_centred_alignment_by_hand():
    """Around (10, 0): the latent lies at (0, 2), its targets at (3, 4) and (0, -1); cosines 0.8 and -1."""
    predicted = torch.tensor([[10.0, 2.0], [10.0, 2.0]]).view(1, 1, 2, 2).requires_grad_()
    targets = torch.tensor([[13.0, 4.0], [10.0, -1.0]]).view(1, 1, 2, 2)
    mask, center = torch.ones(1, 1, 2, dtype=torch.bool), torch.tensor([10.0, 0.0], requires_grad=True)
    loss, cosine = alignment_loss(predicted, targets, mask, center=center)
    assert loss.item() == pytest.approx((0.2 + 2.0) / 2)
    plain, plain_cosine = alignment_loss(predicted, targets, mask)
    assert plain < 0.05 and cosine == plain_cosine
    loss.backward()
    assert center.grad is None and predicted.grad.abs().sum() > 0


def test_the_center_is_the_mean_of_the_candidates_there_are():
    candidates = torch.tensor([[[[9.0, 0.0], [11.0, 0.0], [7.0, 7.0]]]])
    exists, mask = torch.tensor([[[True, True, False]]]), torch.ones(1, 1, 1, dtype=torch.bool)
    indices = torch.zeros(1, 1, 1, dtype=torch.long)
    selection = Selection(candidates[:, :, :1], mask, indices, None, candidates, exists)
    args = SimpleNamespace(alignment="centred", alignment_noise=0.0)
    latents = torch.tensor([9.0, 1.0]).view(1, 1, 1, 2)  # (-1, 1) around the center, and its target (-1, 0)
    assert alignment_term(latents, selection, args)[0].item() == pytest.approx(1 - math.sqrt(0.5))


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
