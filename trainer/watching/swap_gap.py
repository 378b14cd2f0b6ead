"""Whether answers need the latents they were thought with: accuracy with a sample's own, and with another's.

B batch, S spans, K latents a span, D hidden.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState

from ilvr.data import prompt_of
from ilvr.data.conversations import last_boxed
from ilvr.latent_spans import pad_spans

from ..running.sharding import is_sharded


Intervention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def is_boxed(answer: str, reference: str) -> bool:
    r"""Whether the last \boxed{…} of an answer is the reference, but for spaces."""
    box = last_boxed(answer)
    return box is not None and box.split() == reference.split()


def latents_of_the_row_before(latents: list[torch.Tensor]) -> Intervention:
    """A `latent_intervention` for `generate`: each row is fed the latents of the row before, the first those of the
    last.

    Args:
        latents (`list[torch.Tensor]`): the rows' own, (S, K, D) each, of an earlier `generate(output_latents=True)`.

    Returns:
        `Callable`: a row keeps its own latents where the row before has none of that span.
    """
    values, exists = pad_spans([latents[-1], *latents[:-1]])  # (B, S, K, D), (B, S, K)
    rows, num_spans = torch.arange(len(values), device=values.device), values.shape[1]

    def intervene(own: torch.Tensor, span: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        place = rows, span.clamp(0, num_spans - 1), index.clamp(min=0)
        given = (span >= 0) & (span < num_spans) & exists[place]
        return torch.where(given.unsqueeze(1), values[place].to(own), own)

    return intervene


class SwapGapCallback(TrainerCallback):
    """
    Logs, at each evaluation, how right greedy answers to a few held-out questions are with the model's own latents and
    with those of another sample: `eval_accuracy`, `eval_swapped_accuracy`, their difference `eval_swap_gap`, and
    `eval_emission_rate`, the share of answers with a latent span.

    The numbers are metrics of the evaluation, so `metric_for_best_model="eval_swap_gap"`, `load_best_model_at_end` and
    transformers' `EarlyStoppingCallback` work on them: stage 2 can stop when its latents fall out of use. Training is
    as without the callback.

    Args:
        trainer ([`ILVRTrainer`]).
        samples (`Dataset`): with `messages`, `images` and `answer`, the reference; the first `num_samples` are asked.
        is_right (`Callable`, *optional*, defaults to whether the last `\\boxed{…}` is the reference): of an answer and
            its reference.
        num_samples (`int`, *optional*, defaults to 64): at most so many.
        every (`int`, *optional*): optimizer steps between two measurements, beside those at evaluations.
        batch_size (`int`, *optional*, defaults to 16): questions answered at once, at least 2.
        generate_kwargs: passed to `generate`; greedy decoding, at most 256 new tokens, by default.

    Raises:
        ValueError: if there are fewer than two samples, columns are missing, or the model is sharded.

    Example:

    ```python
    >>> from transformers import EarlyStoppingCallback

    >>> trainer.add_callback(SwapGapCallback(trainer, task.dataset("test")))
    >>> trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
    ```
    """

    def __init__(
        self,
        trainer: Any,
        samples: Dataset,
        *,
        is_right: Callable[[str, str], bool] = is_boxed,
        num_samples: int = 64,
        every: int | None = None,
        batch_size: int = 16,
        **generate_kwargs: Any,
    ) -> None:
        missing = {"messages", "images", "answer"} - set(samples.column_names)
        if missing or min(len(samples), num_samples, batch_size) < 2:
            raise ValueError(
                "The swap gap needs two samples or more in a batch, with messages, images and answer; got "
                f"{len(samples)} samples without {sorted(missing)}, {num_samples=} and {batch_size=}."
            )
        if is_sharded(trainer.accelerator):
            raise ValueError(
                "The swap gap lets the model generate, which a sharded one cannot. Leave the callback out."
            )
        self.trainer, self.is_right, self.every = trainer, is_right, every
        self.samples = samples.select(range(min(len(samples), num_samples)))
        self.batch_size = batch_size
        self.generate_kwargs = {"do_sample": False, "max_new_tokens": 256, **generate_kwargs}
        self.step, self.found = -1, {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Before all others, whatever their order: they read what this one adds to the metrics.
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))

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
        model = self.trainer.model
        training = model.training
        model.eval()  # the trainer logs by this, and keeps the sums of training
        try:
            self.step, self.found = step, self.measure()
            self.trainer.log({**self.found})
        finally:
            model.train(training)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The four numbers, of the model as it is."""
        right, swapped_right, emitted = [], [], []
        indices = torch.arange(len(self.samples)).tensor_split(math.ceil(len(self.samples) / self.batch_size))
        for part in indices:  # nearly equal, so that none has one row
            rows = [self.samples[i] for i in part.tolist()]
            answers, latents = self._answers(rows)
            swapped = answers
            if any(map(len, latents)):
                swapped, _ = self._answers(rows, latent_intervention=latents_of_the_row_before(latents))
            right += [self.is_right(answer, row["answer"]) for answer, row in zip(answers, rows)]
            swapped_right += [self.is_right(answer, row["answer"]) for answer, row in zip(swapped, rows)]
            emitted += [len(own) > 0 for own in latents]
        accuracy, swapped_accuracy = sum(right) / len(right), sum(swapped_right) / len(right)
        return {
            "eval_accuracy": accuracy,
            "eval_swapped_accuracy": swapped_accuracy,
            "eval_swap_gap": accuracy - swapped_accuracy,
            "eval_emission_rate": sum(emitted) / len(emitted),
        }

    def _answers(self, rows: list[dict[str, Any]], **options: Any) -> tuple[list[str], list[torch.Tensor]]:
        """Answers to the first question of each row, and the latents (S, K, D) of each."""
        processor = self.trainer.processing_class
        inputs = processor.apply_chat_template(
            [prompt_of(row) for row in rows],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.trainer.accelerator.device)
        options |= {"output_latents": True, "return_dict_in_generate": True, **self.generate_kwargs}
        with self.trainer.accelerator.autocast():
            outputs = self.trainer.student.generate(**inputs, **options)
        new_ids = outputs.sequences[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(new_ids, skip_special_tokens=True), outputs.latents
