"""Asking the model that is being trained, from a callback."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset

from ilvr.trainer import ILVRGRPOTrainer, ILVRTrainer
from ilvr.trainer.running.sharding import gathered, is_zero3

from .questions import Questions
from .records import Evaluator


def evaluator_of(
    trainer: ILVRTrainer | ILVRGRPOTrainer,
    questions: Questions | Dataset,
    num_samples: int,
    batch_size: int,
    **generate_kwargs: Any,
) -> Evaluator:
    """Asks the model of a trainer some held-out questions.

    Args:
        trainer ([`ILVRTrainer`] or [`ILVRGRPOTrainer`]).
        questions ([`Questions`] or `Dataset`): a data set with `messages`, `images` and `answer` is one of boxed
            answers.
        num_samples (`int`): at most so many are asked, evenly spread.
        batch_size (`int`): questions answered at once.
        generate_kwargs: passed to `generate`.

    Raises:
        ValueError: if a question has no answer, or the model is sharded by ZeRO-3.
    """
    if is_zero3(trainer.accelerator):
        raise ValueError(
            "A model under ZeRO-3 cannot generate while it is trained. Leave the callback out, or train with FSDP2, "
            "DDP or ZeRO-2."
        )
    asked = Questions.of_dataset(questions) if isinstance(questions, Dataset) else questions
    model: Any = trainer.student
    processor: Any = trainer.processing_class
    return Evaluator(model, processor, asked.select(num_samples), batch_size=batch_size, **generate_kwargs)


@contextmanager
def evaluating(trainer: ILVRTrainer | ILVRGRPOTrainer) -> Generator[None]:
    """The trainer's model as evaluations run it; also what the trainer logs then is logged as of an evaluation."""
    model: Any = trainer.model
    training = model.training
    model.eval()
    try:
        with gathered(trainer.accelerator, trainer.model), trainer.accelerator.autocast():
            yield
    finally:
        model.train(training)
