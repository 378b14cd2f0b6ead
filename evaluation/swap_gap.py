"""Whether answers need the latents they were thought with, while a model is trained."""

from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState

from ilvr.trainer import ILVRGRPOTrainer, ILVRTrainer

from .controls import run_controls
from .in_training import evaluating, evaluator_of
from .questions import Questions


class SwapGapCallback(TrainerCallback):
    """
    Logs, at each evaluation, how right greedy answers to a few held-out questions are with the model's own latents and
    with those of another sample: `eval_accuracy`, `eval_swapped_accuracy`, their difference `eval_swap_gap`, and
    `eval_emission_rate`, the share of answers with a latent span.

    The numbers are metrics of the evaluation, so `metric_for_best_model="eval_swap_gap"`, `load_best_model_at_end` and
    transformers' `EarlyStoppingCallback` work on them: stage 2 can stop when its latents fall out of use. Training is
    as without the callback.

    Args:
        trainer ([`ILVRTrainer`] or [`ILVRGRPOTrainer`]).
        questions ([`Questions`] or `Dataset`): asked; a data set with `messages`, `images` and `answer` is one of
            boxed answers.
        num_samples (`int`, *optional*, defaults to 64): at most so many, evenly spread.
        every (`int`, *optional*): optimizer steps between two measurements, the first before training, beside those
            at evaluations.
        batch_size (`int`, *optional*, defaults to 16): questions answered at once.
        generate_kwargs: passed to `generate`; greedy decoding, at most 256 new tokens, by default.

    Raises:
        ValueError: if there are fewer than two questions, one has no answer, or the model is sharded by ZeRO-3.

    Example:

    ```python
    >>> from transformers import EarlyStoppingCallback

    >>> trainer.add_callback(SwapGapCallback(trainer, Questions.of_task(task)))
    >>> trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
    ```
    """

    def __init__(
        self,
        trainer: ILVRTrainer | ILVRGRPOTrainer,
        questions: Questions | Dataset,
        *,
        num_samples: int = 64,
        every: int | None = None,
        batch_size: int = 16,
        **generate_kwargs: Any,
    ) -> None:
        if len(questions) < 2 or num_samples < 2:
            raise ValueError(
                f"Latents are swapped between two questions or more, got {len(questions)} and {num_samples=}."
            )
        self.trainer, self.every = trainer, every
        self.evaluator = evaluator_of(trainer, questions, num_samples, batch_size, **generate_kwargs)
        self.step, self.found = -1, {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Before all others, whatever their order: they read what this one adds to the metrics.
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        if self.every and state.global_step == 0:
            self._log(0)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict | None = None, **kwargs: Any
    ) -> None:
        self._log(state.global_step)
        if metrics is not None:
            metrics.update(self.found)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self._log(state.global_step)

    def _log(self, step: int) -> None:
        if step == self.step:  # several data sets may be evaluated after one step
            return
        with evaluating(self.trainer):
            self.step, self.found = step, self.measure()
            self.trainer.log({**self.found})

    def measure(self) -> dict[str, float]:
        """The four numbers, of the model as it is."""
        own, swapped = run_controls(self.evaluator, ["another_sample"]).values()
        accuracy, swapped_accuracy = (sum(run.right) / len(run.right) for run in (own, swapped))
        return {
            "eval_accuracy": accuracy,
            "eval_swapped_accuracy": swapped_accuracy,
            "eval_swap_gap": accuracy - swapped_accuracy,
            "eval_emission_rate": 1 - own.without_span,
        }
