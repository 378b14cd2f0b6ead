"""A study as its YAML file says it: a task, tests, and arms that differ from each other in one thing."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ilvr.tasks import Task, load_task
from ilvr.trainer import ILVRGRPOConfig, ILVRTrainingConfig


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        form (`str`): of the task's training data and test questions, see [`~ilvr.tasks.Task`].
        settings (`dict`): of [`ILVRTrainingConfig`], on top of the study's; with `rewards`, of [`ILVRGRPOConfig`].
        task (`dict`, *optional*): settings of the task that it trains on, on top of the study's.
        after (`str`, *optional*): the arm whose checkpoint is trained further; a new backbone by default.
        backbone (`dict`, *optional*): sizes of a new backbone, on top of the study's.
        model (`dict`, *optional*): settings of the model that training starts with, such as `latent_head`.
        controls (`list[str]`, *optional*): what its tests run beside its own latents, see `ilvr.evaluation`.
        rewards (`list[str]`, *optional*): makes it reinforcement learning: `accuracy`, `format`, `span`,
            `latent_contrast`.
        until_loss (`float`, *optional*): trained again by the same settings, a second and a third time, until the loss
            that it logs last is at most this.
        watched (`int`, *optional*): steps between two looks at held-out questions of its own task while it trains.
        note (`str`, *optional*): what it is, for the table.
    """

    form: str
    settings: dict[str, Any]
    task: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    backbone: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    controls: list[str] = field(default_factory=list)
    rewards: list[str] = field(default_factory=list)
    until_loss: float | None = None
    watched: int | None = None
    note: str = ""


@dataclass
class Study:
    """What is compared.

    Args:
        name (`str`): of the study and its files.
        task (`str`), task_settings (`dict`): see [`~ilvr.tasks.load_task`].
        tests (`dict[str, dict]`): by name, the settings in which a test differs from the training's, and `samples`.
        backbone (`dict`): sizes of the small backbone.
        training (`dict`): [`ILVRTrainingConfig`] settings of all arms.
        controlled (`int`): test samples that controls are run on.
        arms (`dict[str, Arm]`): by name; those that an arm continues come before it.
        batch_size (`int`), max_new_tokens (`int`): of the tests.
        training_samples (`int`, *optional*): the first of the task's to train on; all by default.
        runs (`Path`), results (`Path`): folders of checkpoints and of what was measured.
    """

    name: str
    task: str
    task_settings: dict[str, Any]
    tests: dict[str, dict[str, Any]]
    backbone: dict[str, Any]
    training: dict[str, Any]
    controlled: int
    arms: dict[str, Arm]
    batch_size: int = 125
    max_new_tokens: int = 160
    training_samples: int | None = None
    runs: Path = Path("runs/studies")
    results: Path = Path("studies/results")

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """Reads a study and checks the settings of all arms.

        Raises:
            ValueError: names the arm that continues one that does not come before it, or has a wrong setting.
        """
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        study = cls(**{**given, "arms": {name: Arm(**arm) for name, arm in given["arms"].items()}})
        before: list[str] = []
        for name, arm in study.arms.items():
            if arm.after is not None and arm.after not in before:
                raise ValueError(f"Arm {name} continues {arm.after!r}, which does not come before it.")
            before.append(name)
            try:
                config = ILVRGRPOConfig if arm.rewards else ILVRTrainingConfig
                config("unused", **study.settings_of(name, seed=0))
            except (TypeError, ValueError) as error:
                raise ValueError(f"Arm {name} (with `training`): {error}") from error
        return study

    def rehearsal(self, folder: Path) -> "Study":
        """The same arms with two steps and eight questions, in a folder of their own: what fails, fails in minutes."""
        few = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
        few |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "warmup_steps": 0}
        short = {"num_generations": 2, "max_completion_length": 8}
        arms = {
            name: replace(arm, settings={**arm.settings, **few, **(short if arm.rewards else {})}, until_loss=None)
            for name, arm in self.arms.items()
        }
        tests = {name: {**own, "samples": 8} for name, own in self.tests.items()}
        places = {"runs": folder / "runs", "results": folder / "results"}
        return replace(self, arms=arms, tests=tests, controlled=4, training_samples=16, **places)

    def with_those_before(self, names: list[str]) -> list[str]:
        """Arms, each behind those that it continues."""
        found: list[str] = []
        for name in names:
            after = self.arms[name].after
            before = [] if after is None else self.with_those_before([after])
            found += [arm for arm in (*before, name) if arm not in found]
        return found

    def settings_of(self, arm: str, seed: int) -> dict[str, Any]:
        """The training settings of an arm."""
        own = self.arms[arm]
        return {"seed": seed, **({} if own.rewards else self.training), **own.settings}

    def definition_of(self, arm: str, seed: int) -> dict[str, Any]:
        """What the results of an arm follow from, beside the code: its settings, those of the arms that it continues,
        and those of the study; as JSON has them."""
        own = vars(self.arms[arm]) | {"settings": self.settings_of(arm, seed)}
        if own["after"] is not None:
            own["after"] = self.definition_of(own["after"], seed)["arm"]
        unnamed = ("note", "controls", "watched", *(name for name in ("rewards", "until_loss") if not own[name]))
        named = {name: value for name, value in own.items() if name not in unnamed}
        found = {"arm": named, "task": self.task_settings, "tests": self.tests, "backbone": self.backbone}
        return json.loads(json.dumps(found))

    def is_of(self, result: dict[str, Any]) -> bool:
        """Whether a result follows from this study. The bound of a loss may have been another one: an arm is the same
        that meets this one, too."""
        own, bound = self.definition_of(result["arm"], result["seed"]), self.arms[result["arm"]].until_loss
        is_met = bound is None or result["log"][-1]["loss"] <= bound
        return is_met and _unbound(own) == _unbound(result["definition"])

    def task_of(self, seed: int, test: str | None = None, *, arm: str | None = None) -> Task:
        """The task under a seed, with the settings of a test, or of an arm's training."""
        own = self.tests[test] if test is not None else self.arms[arm].task if arm is not None else {}
        own = {name: value for name, value in own.items() if name != "samples"}
        return load_task(self.task, **{"seed": seed, **self.task_settings, **own})


def _unbound(definition: Any) -> Any:
    """A definition without `until_loss`, its own and that of the arms before."""
    if not isinstance(definition, dict):
        return definition
    return {name: _unbound(value) for name, value in definition.items() if name != "until_loss"}
