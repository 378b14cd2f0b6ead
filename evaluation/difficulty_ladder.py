"""A ladder over difficulty: the next level when the present one is mastered, back when the one before is forgotten.

The rule is that of arXiv 2609.19717: up at an accuracy of 0.9 in five evaluations in a row, down when it drops, and a
tenth of the samples from earlier levels.
"""

from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from ilvr.trainer import ILVRTrainer
from ilvr.trainer.inputs.columns import LEVEL
from ilvr.trainer.inputs.sampler import LadderSampler

from .in_training import evaluating, evaluator_of
from .questions import Questions


def join_levels(levels: list[Dataset]) -> Dataset:
    """Training data of a ladder: data sets from the easiest on, as one with a column `level` from 0 on."""
    return concatenate_datasets([data.add_column(LEVEL, [i] * len(data)) for i, data in enumerate(levels)])


class DifficultyLadder(TrainerCallback, ExportableState):
    """
    Trains on one level of difficulty after the other, and rehearses earlier ones.

    Every so many steps the model answers held-out questions of the present level and of the one before. The log has
    `ladder_level` and `ladder_accuracy`, that of the present level. A level holds from the first sample on that has
    not been fetched. A resumed run equals the run that was not interrupted.

    Args:
        trainer ([`ILVRTrainer`]): its training data has a column `level` from 0 on; see [`join_levels`].
        tests (`list` of [`Questions`] or `Dataset`): held-out questions of each level; a data set with `messages`,
            `images` and `answer` is one of boxed answers.
        every (`int`, *optional*, defaults to 50): optimizer steps between two evaluations.
        threshold (`float`, *optional*, defaults to 0.9): accuracy at which a level counts as mastered.
        patience (`int`, *optional*, defaults to 5): evaluations in a row that it has to be.
        fall_back (`float`, *optional*, defaults to 0.8): accuracy on the level before, below which it is trained again
            (the number is ours).
        rehearsal (`float`, *optional*, defaults to 0.1): share of samples from earlier levels.
        num_samples (`int`, *optional*, defaults to 64): at most so many questions of a level, evenly spread.
        batch_size (`int`, *optional*, defaults to 16): questions answered at once.
        generate_kwargs: passed to `generate`; greedy decoding, at most 256 new tokens, by default.

    Raises:
        ValueError: if the levels of the data and of the tests disagree, a number is out of range, or the trainer
            cannot draw by level.

    Example:

    ```python
    >>> levels = [load_task("shifts", boards=1000, test_boards=64, lengths=(n, n)) for n in (1, 2, 4)]
    >>> train = join_levels([level.dataset("train") for level in levels])
    >>> trainer = ILVRTrainer(model, args, train_dataset=train)
    >>> trainer.add_callback(DifficultyLadder(trainer, [Questions.of_task(level) for level in levels]))
    ```
    """

    def __init__(
        self,
        trainer: ILVRTrainer,
        tests: list[Questions] | list[Dataset],
        *,
        every: int = 50,
        threshold: float = 0.9,
        patience: int = 5,
        fall_back: float = 0.8,
        rehearsal: float = 0.1,
        num_samples: int = 64,
        batch_size: int = 16,
        **generate_kwargs: Any,
    ) -> None:
        if min(every, patience, num_samples, batch_size) < 1 or not 0 <= rehearsal <= 1:
            raise ValueError(
                "A ladder takes numbers from 1 on and a share to rehearse from 0 to 1, got "
                f"{every=}, {patience=}, {num_samples=}, {batch_size=} and {rehearsal=}."
            )
        if not 0 <= fall_back <= threshold <= 1:
            raise ValueError(f"A ladder falls back below what it goes up at, got {fall_back=} and {threshold=}.")
        self._check(trainer, tests)
        self.trainer = trainer
        self.every, self.threshold, self.patience, self.fall_back = every, threshold, patience, fall_back
        self.evaluators = [evaluator_of(trainer, test, num_samples, batch_size, **generate_kwargs) for test in tests]
        self.streak = 0  # evaluations in a row at which the present level was mastered
        dataset: Any = trainer.train_dataset
        levels = list(dataset[LEVEL])
        self.train_sampler = LadderSampler(levels, rehearsal=rehearsal, seed=trainer.args.seed)

    @staticmethod
    def _check(trainer: ILVRTrainer, tests: list[Any]) -> None:
        dataset: Any = trainer.train_dataset
        args = trainer.args
        if not isinstance(dataset, Dataset) or LEVEL not in dataset.column_names:
            raise ValueError("A ladder needs training data with a column `level`, no stream. Use `join_levels`.")
        levels = set(dataset[LEVEL])
        if levels != set(range(len(tests))) or not all(map(len, tests)):
            raise ValueError(
                f"The training data has the levels {sorted(levels)}, and there are tests of {len(tests)}, with "
                f"{[len(test) for test in tests]} samples. Give some of each level from 0 on."
            )
        if args.train_sampling_strategy == "group_by_length":
            raise ValueError("A ladder draws by level. Leave train_sampling_strategy='group_by_length' out.")
        if args.restore_callback_states_from_checkpoint:
            raise ValueError("A ladder reads its state itself. Set restore_callback_states_from_checkpoint=False.")

    # ------------------------------------------------------------------------------------------------- what is saved

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps of it."""
        return {"args": {}, "attributes": {"streak": self.streak, "history": self.train_sampler.history}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:  # a run of its own, which counts its draws anew
            self.streak, self.train_sampler.history = 0, [[0, self.train_sampler.level]]
            return
        states: Any = state.stateful_callbacks
        saved = states.get(type(self).__name__)
        if saved is None:
            raise ValueError("The checkpoint was trained without a ladder. Resume without it, or start anew.")
        self.streak, self.train_sampler.history = saved["attributes"]["streak"], saved["attributes"]["history"]

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.train_sampler.epoch = int(state.epoch)  # by itself: `set_epoch` does not reach it in all resumed runs

    # ------------------------------------------------------------------------------------------------- up and down

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        level = self.train_sampler.level
        with evaluating(self.trainer):
            # Of one process for all: they have to agree.
            found = broadcast_object_list([[self.accuracy(i) for i in range(max(level - 1, 0), level + 1)]])[0]
            self.trainer.log({"ladder_level": level, "ladder_accuracy": found[-1]})
        self.streak = self.streak + 1 if found[-1] >= self.threshold else 0
        if level > 0 and found[0] < self.fall_back:
            self._move_to(level - 1)
        elif self.streak >= self.patience and level + 1 < len(self.evaluators):
            self._move_to(level + 1)

    def _move_to(self, level: int) -> None:
        self.train_sampler.move_to(level)
        self.streak = 0

    def accuracy(self, level: int) -> float:
        """The share of right answers to the held-out questions of a level, of the model as it is."""
        right = self.evaluators[level].run().right
        return sum(right) / len(right)
