"""Watching a run: throughput, memory, averages over ranks, and the share of K* as a histogram."""

import time

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback


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


def peak_gpu_memory(device: torch.device) -> dict[str, float]:
    """The most memory that tensors of this process held on a CUDA device since the last call."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"gpu_memory_gib": peak / 2**30}


class StepClock(TrainerCallback):
    """Time and tokens of optimizer steps. What lies between two steps (logging, drawing, evaluation, saving) does not
    count; waiting for data and the update of the teacher do."""

    def __init__(self):
        self.seconds, self.steps = 0.0, 0

    def start(self):
        """Called when a step begins to fetch its batches, before any event."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
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


def tensorboard_writer(trainer):
    """The `SummaryWriter` that `report_to="tensorboard"` has open in this process, if there is one."""
    callbacks = trainer.callback_handler.callbacks
    return next((c.tb_writer for c in callbacks if isinstance(c, TensorBoardCallback)), None)


def trackio_module(trainer):
    """`trackio`, if `report_to="trackio"` has a run open in this process."""
    if not any(isinstance(c, TrackioCallback) for c in trainer.callback_handler.callbacks):
        return None
    import trackio

    return trackio if trainer.is_world_process_zero() else None


class SelectionHistogramCallback(TrainerCallback):
    """Shows the logged shares `selected_1` to `selected_K` as one histogram: the log itself holds numbers only."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        shares = [logs[name] for k in range(1, len(logs)) if (name := f"selected_{k}") in logs]
        if not shares:
            return
        edges = [k + 0.5 for k in range(len(shares) + 1)]
        if writer := tensorboard_writer(self.trainer):
            writer.add_histogram_raw(
                "train/selected",
                min=1,
                max=len(shares),
                num=1,
                sum=logs["selected_per_span"],
                sum_squares=sum(k * k * share for k, share in enumerate(shares, 1)),
                bucket_limits=edges[1:],
                bucket_counts=shares,
                global_step=state.global_step,
            )
        if trackio := trackio_module(self.trainer):
            histogram = trackio.Histogram(np_histogram=(shares, edges))
            trackio.log({"train/selected": histogram, "train/global_step": state.global_step})
