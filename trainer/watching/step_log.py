"""Averages of a run over micro-batches and ranks."""

import torch
from accelerate.utils import gather_object


def sum_over_ranks(recorded: dict[str, list[torch.Tensor]], accelerator) -> dict[str, tuple[float, float]]:
    """Adds up totals and counts, with one wait for the device and one exchange between the ranks.

    Args:
        recorded (`dict[str, list[torch.Tensor]]`): by name, a list with one pair of total and count, of this rank.
            Ranks may have other names than each other, as one whose batches had no span.
        accelerator ([`~accelerate.Accelerator`]).

    Returns:
        `dict[str, tuple[float, float]]`: total and count over all ranks.
    """
    own = dict(zip(recorded, torch.stack([pair for (pair,) in recorded.values()]).tolist() if recorded else []))
    ranks = gather_object([own]) if accelerator.num_processes > 1 else [own]
    names = sorted(set().union(*ranks))
    return {name: tuple(map(sum, zip(*(rank[name] for rank in ranks if name in rank)))) for name in names}
