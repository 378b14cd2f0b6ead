"""The alignment of latents with what was selected for them: the term of the loss, and what the log says of it.

B batch, S spans, K latents a span, N candidates of a picture, D hidden.
"""

from collections.abc import Iterator

import torch

from .ilvr_training_config import ILVRTrainingConfig
from .losses import alignment_loss, infonce_loss, mean_pairwise_cosine
from .selection import Selection


def alignment_term(
    latents: torch.Tensor, selection: Selection, args: ILVRTrainingConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The alignment loss by `args.alignment`, and the mean cosine of latents and targets.

    Args:
        latents (`torch.Tensor` of shape `(B, S, K, D)`): what the model predicts.
        selection ([`Selection`]): its targets.
        args ([`ILVRTrainingConfig`]): names the loss and its settings.
    """
    chosen = (selection.targets, selection.mask)
    center = selection.candidates[selection.candidate_mask].mean(0) if args.alignment == "centred" else None
    loss, cosine = alignment_loss(latents, *chosen, noise_std=args.alignment_noise, center=center)
    if args.alignment == "infonce":
        among = (selection.candidates, selection.candidate_mask, selection.indices)
        loss = infonce_loss(latents, *chosen, *among, temperature=args.alignment_temperature)
    return loss, cosine


@torch.no_grad()
def alignment_statistics(
    latents: torch.Tensor, selection: Selection
) -> Iterator[tuple[int | torch.Tensor, dict[str, torch.Tensor]]]:
    """What the log says of latents (B, S, K, D) and their targets: means by name, with the number of things that they
    are over."""
    exists = selection.mask
    found = selection.nearest(latents) == selection.indices
    fed, aimed = (vectors.norm(dim=-1)[exists].float().mean() for vectors in (latents, selection.targets))
    yield exists.sum(), {"retrieval_at_1": found[exists].float().mean(), "latent_norm_ratio": fed / aimed}
    yield exists.any(-1).sum(), selection.statistics()
    followed = selection.holds_followed()
    yield len(followed), {"followed_share": followed.float().mean()}
    yield 1, {"target_similarity": mean_pairwise_cosine(selection.targets[exists][:512])}
