"""What a run reports to: TensorBoard and Trackio, and the share of K* as a histogram."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback


def tensorboard_writer(trainer: Any) -> Any:
    """The `SummaryWriter` that `report_to="tensorboard"` has open in this process, if there is one."""
    callbacks = trainer.callback_handler.callbacks
    return next((c.tb_writer for c in callbacks if isinstance(c, TensorBoardCallback)), None)


def trackio_module(trainer: Any) -> Any:
    """`trackio`, if `report_to="trackio"` has a run open in this process."""
    if not any(isinstance(c, TrackioCallback) for c in trainer.callback_handler.callbacks):
        return None
    import trackio

    return trackio if trainer.is_world_process_zero() else None


class SelectionHistogramCallback(TrainerCallback):
    """Shows the logged shares `selected_1` to `selected_K` as one histogram: the log itself holds numbers only."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
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
