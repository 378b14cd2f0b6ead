"""What a run counts between two lines of its log, on all micro-batches and ranks."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


class StepLog:
    """Means and totals since they were last read.

    The values stay on the device until then: reading one would wait for it.

    Args:
        accelerator ([`~accelerate.Accelerator`]).
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: dict[str, torch.Tensor] = {}  # name: (2,), a sum and the number of things that it is over
        self.totals: dict[str, torch.Tensor] = {}

    def add_means(self, count: int | torch.Tensor, **means: float | torch.Tensor) -> None:
        """Adds means over `count` things of a micro-batch; those over nothing, which are nan, do not count."""
        count = self._scalar(count)
        for name, mean in means.items():
            total = torch.where(count > 0, self._scalar(mean) * count, 0)
            self.sums[name] = self.sums.get(name, 0) + torch.stack([total, count])

    def add_totals(self, **totals: int | torch.Tensor) -> None:
        """Adds numbers of things, such as tokens."""
        for name, total in totals.items():
            self.totals[name] = self.totals.get(name, 0) + self._scalar(total)

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means and totals over all ranks since the last call, with one wait for the device and one exchange.

        Ranks may have other names than each other, as one whose batches had no span. A mean of nothing is left out.
        """
        own = self.state_dict()
        self.sums, self.totals = {}, {}
        ranks = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        sums = {name: tuple(map(sum, zip(*pairs))) for name, pairs in _by_name(ranks, "sums").items()}
        means = {name: total / count for name, (total, count) in sums.items() if count}
        return means, {name: sum(totals) for name, totals in _by_name(ranks, "totals").items()}

    def state_dict(self) -> dict[str, dict]:
        """What this rank has counted, as plain numbers."""
        names, totals = [*self.sums], [*self.totals]
        rows = [*self.sums.values(), *(torch.stack([t, t]) for t in self.totals.values())]
        numbers = torch.stack(rows).tolist() if rows else []
        return {
            "sums": dict(zip(names, numbers)),
            "totals": {name: total for name, (total, _) in zip(totals, numbers[len(names) :])},
        }

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Goes on from what [`state_dict`] gave."""
        self.sums = {name: self._scalar(pair) for name, pair in state["sums"].items()}
        self.totals = {name: self._scalar(total) for name, total in state["totals"].items()}

    def _scalar(self, value: Any) -> torch.Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device).detach()


def _by_name(ranks: list[dict], kind: str) -> dict[str, list]:
    names = sorted({name for rank in ranks for name in rank[kind]})
    return {name: [rank[kind][name] for rank in ranks if name in rank[kind]] for name in names}
