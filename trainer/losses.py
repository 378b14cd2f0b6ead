"""The parts of the ILVR loss. Pure functions.

Shapes: B batch, T sequence, S spans, K latents a span, D hidden, V vocabulary.
"""

import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize


def alignment_loss(
    predicted_latents: torch.Tensor,
    targets: torch.Tensor,
    target_mask: torch.Tensor,
    *,
    noise_std: float = 0.0,
    center: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - cosine between what the model feeds back and what the teacher selected (paper, equation 8).

    Args:
        predicted_latents (`torch.Tensor` of shape `(B, S, K, D)`): latent_head(h_{t-1}) at each latent position t.
        targets (`torch.Tensor` of shape `(B, S, K, D)`): selected features of the helper images, no gradient.
        target_mask (`torch.BoolTensor` of shape `(B, S, K)`): which positions have a target.
        noise_std (`float`, *optional*, defaults to 0.0): normal noise added to the targets; 0.01 in the paper.
        center (`torch.Tensor` of shape `(D,)`, *optional*): subtracted from both before the cosine is taken (ours),
            such as the mean feature, so that what all features have in common does not satisfy the loss. The latents
            should then be of the features' size.

    Returns:
        `tuple`: the loss, a mean over each sample's targets and then over the samples that have any, as batch 1 with
        accumulation gives it; and the mean cosine without noise and center, for the log.
    """
    predicted, targets = predicted_latents.float(), targets.float()
    noisy = targets + noise_std * torch.randn_like(targets) if noise_std else targets
    origin = 0 if center is None else center.detach().float()
    per_latent = 1 - cosine_similarity(predicted - origin, noisy - origin, dim=-1)  # (B, S, K)
    with torch.no_grad():
        cosine = cosine_similarity(predicted, targets, dim=-1)[target_mask].mean()
    return _mean_of_samples(per_latent, target_mask), cosine


def infonce_loss(
    predicted_latents: torch.Tensor,
    targets: torch.Tensor,
    target_mask: torch.Tensor,
    candidates: torch.Tensor,
    candidate_mask: torch.Tensor,
    indices: torch.Tensor,
    *,
    temperature: float,
) -> torch.Tensor:
    """Each latent picks its own target, by cosine, among the other candidates of its helper image and the targets of
    other rows (InfoNCE, arXiv 1807.03748; for latents, CoLVR, arXiv 2605.08802).

    A plain cosine is nearly satisfied by what all features have in common; here that cancels.

    Args:
        predicted_latents, targets (`torch.Tensor` of shape `(B, S, K, D)`), target_mask (`torch.BoolTensor` of shape
            `(B, S, K)`): as in [`alignment_loss`].
        candidates (`torch.Tensor` of shape `(B, S, N, D)`), candidate_mask (`torch.BoolTensor` of shape `(B, S, N)`):
            features of the helper images.
        indices (`torch.LongTensor` of shape `(B, S, K)`): of the targets among the candidates.
        temperature (`float`): of the softmax over cosines.

    Returns:
        `torch.Tensor`: a mean over each sample's targets and then over the samples that have any, in nats.
    """
    latents, wanted = normalize(predicted_latents.float(), dim=-1), normalize(targets.float(), dim=-1)
    own = torch.einsum("bskd,bsnd->bskn", latents, normalize(candidates.float(), dim=-1)) / temperature
    is_own_target = torch.arange(own.shape[-1], device=own.device) == indices.unsqueeze(-1)  # (B, S, K, N)
    own = own.masked_fill(~candidate_mask.unsqueeze(2) | is_own_target, -torch.inf)
    others = torch.einsum("bskd,ctjd->bskctj", latents, wanted).flatten(3) / temperature  # (B, S, K, B * S * K)
    rows = torch.arange(len(latents), device=own.device)
    is_other = (rows.view(-1, 1, 1, 1) != rows.view(1, -1, 1, 1)) & target_mask.unsqueeze(0)  # (B, B, S, K)
    others = others.masked_fill(~is_other.flatten(1).view(len(rows), 1, 1, -1), -torch.inf)
    right = (latents * wanted).sum(-1, keepdim=True) / temperature
    per_latent = torch.cat([right, own, others], dim=-1).logsumexp(-1) - right.squeeze(-1)  # (B, S, K)
    return _mean_of_samples(per_latent, target_mask)


def _mean_of_samples(per_latent: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
    """A mean over each sample's targets and then over the samples that have any."""
    counts = target_mask.sum((1, 2))
    per_sample = torch.where(target_mask, per_latent, 0).sum((1, 2)) / counts.clamp(min=1)
    return per_sample.sum() / (counts > 0).sum().clamp(min=1)


def gaussian_log_density(latents: torch.Tensor, means: torch.Tensor, sigma: float) -> torch.Tensor:
    """log N(latent; mean, sigma^2 I) without its constant, which cancels in every ratio (VLPO, arXiv 2511.21395).

    With the constant, D / 2 log(2 pi sigma^2), the differences that count would be lost in fp32.

    Args:
        latents (`torch.Tensor` of shape `(…, D)`): as they were drawn.
        means (`torch.Tensor` of shape `(…, D)`): what a model predicts in their place.
        sigma (`float`): standard deviation in each coordinate.

    Returns:
        `torch.Tensor` of shape `(…)`: - |latent - mean|^2 / (2 sigma^2).
    """
    return -(latents.float() - means.float()).square().sum(-1) / (2 * sigma**2)


def token_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of next tokens, already aligned: `logits[:, t]` predicts `labels[:, t]`.

    Args:
        logits (`torch.Tensor` of shape `(B, T, V)`), labels (`torch.LongTensor` of shape `(B, T)`): -100 for no loss.
        num_items (`torch.Tensor` or `int`, *optional*, defaults to the number of labels): the divisor.

    Returns:
        `torch.Tensor`: a scalar; zero, with a gradient of zero, where there is no label.
    """
    total = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    divisor = (labels != -100).sum() if num_items is None else torch.as_tensor(num_items, device=total.device)
    return total / divisor.clamp(min=1)


@torch.no_grad()
def token_statistics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over the labelled columns of what [`token_loss`] scores; its arguments. They are nan where there is none.

    Returns:
        `dict[str, torch.Tensor]`: `ce_loss` and `entropy` in nats, `mean_token_accuracy`.
    """
    counted = labels != -100
    scored, labels = logits[counted].float(), labels[counted]
    log_probs = scored.log_softmax(-1)
    return {
        "ce_loss": -log_probs.gather(1, labels.unsqueeze(1)).mean(),
        "entropy": -(log_probs.exp() * log_probs).sum(-1).mean(),
        "mean_token_accuracy": (scored.argmax(-1) == labels).float().mean(),
    }


def mean_pairwise_cosine(vectors: torch.Tensor) -> torch.Tensor:
    """Mean cosine between all pairs of different rows of `vectors` (M, D): near 1, the targets have collapsed."""
    unit = normalize(vectors.float(), dim=-1)
    count = len(unit)
    if count < 2:
        return vectors.new_zeros((), dtype=torch.float32)
    return (unit.sum(0).square().sum() - count) / (count * (count - 1))
