"""The recipe of `ilvr train`: its fields, how files and options set them, and the training arguments of each phase."""

from argparse import Namespace
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .packaged import packaged_file


@dataclass
class Recipe:
    """What is trained on what. Each phase is a dict of `ILVRTrainingConfig` arguments, on top of `training`."""

    output_dir: str = field(default="runs/ilvr", metadata={"help": "folder of checkpoints, pictures and results"})
    backbone: str | None = field(default=None, metadata={"help": "Hub id or folder of a vision-language model"})
    model: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of an ILVR model to go on from, by the stages that have settings"},
    )
    small_backbone: dict = field(
        default_factory=dict, metadata={"help": "sizes of one that is built if none is named"}
    )
    model_kwargs: dict = field(default_factory=dict, metadata={"help": "arguments of from_pretrained"})
    latent_size: int = field(default=8, metadata={"help": "latents in a span of a new model"})
    latent_head: str | None = field(
        default=None, metadata={"help": "rescale, identity (paper), linear or mlp; by default that of from_backbone"}
    )
    dataset: str | None = field(default=None, metadata={"help": "training data: file, folder or Hub id"})
    dataset_kwargs: dict = field(
        default_factory=dict, metadata={"help": "arguments of load_conversations: image_root, format, split, …"}
    )
    test_dataset: str | None = field(default=None, metadata={"help": "test data: file, folder or Hub id"})
    test_dataset_kwargs: dict = field(default_factory=dict, metadata={"help": "as dataset_kwargs, and on top of them"})
    test_size: float = field(
        default=0.1,
        metadata={"help": "share or, from 1, number of samples held out where no test data are named; 0: no test"},
    )
    metric: str = field(
        default="boxed_exact_match",
        metadata={"help": "of own test data: boxed_exact_match, multiple_choice or a metric's .py file"},
    )
    task: str | None = field(default=None, metadata={"help": "task that gives tests and, without data, training data"})
    task_settings: dict = field(default_factory=dict, metadata={"help": "its arguments, beside the seed"})
    evaluation: dict = field(
        default_factory=dict, metadata={"help": "batch_size, controls (questions), max_new_tokens, …"}
    )
    swap_gap: dict = field(
        default_factory=dict,
        metadata={"help": "SwapGapCallback in the stages: every (steps), num_samples; none: not measured"},
    )
    lora: dict = field(default_factory=dict, metadata={"help": "LoraConfig of the adapter; none: all weights train"})
    resume: bool = field(default=False, metadata={"help": "go on where an earlier run of this recipe stopped"})
    seed: int = field(default=0, metadata={"help": "of weights, task, held-out samples and the order of the data"})
    training: dict = field(default_factory=dict, metadata={"help": "training arguments of all phases"})
    base: dict = field(default_factory=dict, metadata={"help": "the phase that makes a small backbone see"})
    answer_only: dict = field(default_factory=dict, metadata={"help": "the control without traces"})
    text: dict = field(default_factory=dict, metadata={"help": "the control whose traces have words for latents"})
    stage1: dict = field(default_factory=dict, metadata={"help": "alignment with the momentum teacher"})
    stage2: dict = field(default_factory=dict, metadata={"help": "training through the model's own latents"})
    grpo: dict = field(
        default_factory=dict,
        metadata={"help": "rewards after stage 2: ILVRGRPOConfig's arguments; rewards (names), task_settings"},
    )


def read_recipe(options: Namespace) -> Recipe:
    """The recipe of a file, with what the options of `ilvr train` set in place of what it says.

    Args:
        options (`Namespace`): `config`, the path of a YAML file, the name of a recipe of the package or `None`; `set`,
            a list of `NAME=VALUE`, where a name may have dots and a value is YAML; and any field of [`Recipe`].

    Raises:
        ValueError: for a field that a recipe does not have, and a value that is of another kind.
    """
    import yaml

    given = {}
    if options.config is not None:
        given = yaml.safe_load(packaged_file(options.config, "recipes", "recipe").read_text(encoding="utf-8"))
    if not isinstance(given, dict):
        raise ValueError(f"{options.config} holds no fields. Start from one of examples/recipes.")
    own = {
        name: value for name in (f.name for f in fields(Recipe)) if (value := getattr(options, name, None)) is not None
    }
    given |= own
    for assignment in options.set:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: write it as NAME=VALUE, such as stage1.max_steps=10.")
        *outer, last = path.split(".")
        inner = given
        for name in outer:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f"--set {path}: {name} holds {inner!r}, and has no parts.")
        inner[last] = _number(text) if _number(text) is not None else yaml.safe_load(text)
    kinds = {f.name: dict if f.default is MISSING else None for f in fields(Recipe)}
    unknown = [name for name in given if name not in kinds]
    if unknown:
        raise ValueError(f"A recipe has no {', '.join(unknown)}; its fields are {', '.join(kinds)}.")
    for name, value in given.items():
        if (kinds[name] is dict) != isinstance(value, dict):
            takes = "several settings by their names" if kinds[name] is dict else "one value"
            raise ValueError(f"{name} takes {takes}, got {value!r:.80}.")
    return Recipe(**given)


def _number(text: str) -> int | float | None:
    """YAML takes `1e-5` for a text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def phases_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The training arguments of each phase in their order, all checked before the first begins."""
    from ilvr.trainer import ILVRTrainingConfig

    if recipe.task is None and recipe.dataset is None:
        raise ValueError("There is nothing to train on. Name a recipe, such as one of examples/recipes; or --dataset.")
    if recipe.model is not None:
        _check_model(recipe)
    elif recipe.task is None and (recipe.backbone is None or recipe.base):
        raise ValueError("Without a task there is no small backbone to build or to teach. Name a --backbone.")
    if recipe.task is not None and recipe.test_dataset is not None:
        raise ValueError(f"The task {recipe.task} has its own tests. Leave out --task or --test_dataset.")
    phases = {"base": recipe.base, "answer_only": recipe.answer_only, "text": recipe.text}
    stages = {"stage1": recipe.stage1, "stage2": recipe.stage2}
    if recipe.model is not None:
        stages = {name: own for name, own in stages.items() if own}
    phases = {name: own for name, own in phases.items() if own} | stages
    for control in {"answer_only", "text"} & set(phases):
        if not recipe.base:
            raise ValueError(f"`{control}` continues `base`, as stage 1 does. Add `base`, or leave it out.")
        steps = recipe.stage1["max_steps"] + recipe.stage2["max_steps"]
        phases[control] = {"max_steps": steps, **phases[control]}
    if recipe.swap_gap:
        _check_swap_gap(recipe.swap_gap)
    rewarded = _rewarded_phase(recipe) if recipe.grpo else {}
    for name, own in phases.items():
        folder, stage = f"{recipe.output_dir}/{name}", 1 if name == "stage1" else 2
        phases[name] = {"output_dir": folder, "stage": stage, "seed": recipe.seed, **recipe.training, **own}
        try:
            ILVRTrainingConfig(**phases[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} (with `training`): {error}") from error
    return phases | rewarded


def _check_swap_gap(settings: dict[str, Any]) -> None:
    least = {"every": 1, "num_samples": 2, "batch_size": 1}
    wrong = [name for name, value in settings.items() if type(value) is not int or value < least.get(name, value + 1)]
    if wrong or "every" not in settings:
        raise ValueError(
            f"swap_gap takes `every` (steps, at least 1), `num_samples` (at least 2) and `batch_size`, got {settings}."
            " Correct it, or leave it out."
        )


def _check_model(recipe: Recipe) -> None:
    """What cannot be beside `model`, which is trained already."""
    names = ("backbone", "small_backbone", "base", "answer_only", "text", "latent_size", "latent_head", "lora")
    new = Recipe()
    given = [name for name in names if getattr(recipe, name) != getattr(new, name)]
    if given:
        raise ValueError(f"`model` is trained already, and goes on as it is. Leave out {', '.join(given)}.")
    if not (recipe.stage1 or recipe.stage2 or recipe.grpo):
        raise ValueError(f"Nothing says how {recipe.model} is trained further. Set stage1, stage2 or grpo.")


def _rewarded_phase(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The training arguments of `grpo`, on top of those in `training` that it has, too."""
    from ilvr.trainer import ILVRGRPOConfig

    known = {f.name for f in fields(ILVRGRPOConfig)}
    shared = {name: value for name, value in recipe.training.items() if name in known}
    own = {name: value for name, value in recipe.grpo.items() if name not in ("rewards", "task_settings")}
    settings: dict[str, Any] = {"output_dir": f"{recipe.output_dir}/grpo", "seed": recipe.seed, **shared, **own}
    try:
        ILVRGRPOConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"grpo (with `training`): {error}") from error
    return {"grpo": settings}
