"""Time, tokens and memory of optimizer steps."""

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState


def peak_gpu_memory(device: torch.device) -> dict[str, float]:
    """The most memory that tensors of this process held on a CUDA device since the last call."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"gpu_memory_gib": peak / 2**30}


class StepClock(TrainerCallback):
    """Time of optimizer steps. What lies between two steps (logging, drawing, evaluation, saving) does not count;
    waiting for data and what other callbacks do at the end of a step do, so it is added after them."""

    def __init__(self) -> None:
        self.seconds, self.steps, self.started = 0.0, 0, 0.0

    def start(self) -> None:
        """Called when a step begins to fetch its batches, before any event."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # `Trainer` reads the loss of each micro-batch, so the device is hardly behind.
        self.seconds += time.perf_counter() - self.started
        self.steps += 1

    def read(self, tokens: float) -> dict[str, float]:
        """Mean time of the steps since the last call, and throughput, given the tokens of all ranks in them."""
        if not self.steps:
            return {}
        rates = {"step_time": self.seconds / self.steps, "tokens_per_second": tokens / self.seconds}
        self.seconds, self.steps = 0.0, 0
        return rates

    def state_dict(self) -> dict[str, float]:
        """Time and steps that no log has shown yet."""
        return {"seconds": self.seconds, "steps": self.steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from what [`state_dict`] gave."""
        self.seconds, self.steps = state["seconds"], int(state["steps"])
