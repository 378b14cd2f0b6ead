"""Metrics by name, and what they found as scores of groups of samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import evaluate

import ilvr.tasks


HERE = Path(__file__).parent
_GENERAL = {path.stem: path for path in (HERE / "boxed_exact_match.py", HERE / "multiple_choice.py")}
_OF_TASKS = {path.parts[-3]: path for path in Path(ilvr.tasks.__file__).parent.glob("*/metric/[!_]*.py")}
METRICS = {**_GENERAL, **_OF_TASKS}


def load_metric(name: str) -> evaluate.Metric:
    """Loads one of this package's `evaluate` metrics, such as `"frozen_lake"`; works offline.

    Args:
        name (`str`): of a metric here, or the path of a metric's own `.py` file, which is run: that of one's own task.

    Raises:
        ValueError: if there is no such metric.
    """
    own = Path(name) if name.endswith(".py") else None
    if own is not None and own.is_file():
        return cast(evaluate.Metric, evaluate.load(str(own)))
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; choose one of {sorted(METRICS)}, or the path of a .py file.")
    return cast(evaluate.Metric, evaluate.load(str(METRICS[name])))


def score_each(metric: evaluate.Metric, answers: list[str], references: list[Any]) -> list[bool]:
    """Whether each answer is right by itself: whether the metric's first value is 1 for it alone."""
    # `compute` writes its inputs to a file, which for single answers takes far longer than the metric.
    results = [metric._compute(predictions=[a], references=[r]) for a, r in zip(answers, references)]
    return [next(iter(result.values())) == 1 for result in results]


@dataclass(frozen=True)
class Score:
    """The rate that a metric is named for, over one group of samples, with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} – {100 * self.high:.1f})"


def scores_by_group(result: dict[str, float]) -> dict[str, Score]:
    """The scores in a metric's result, by group of samples; the group `""` holds all of them, and comes first.

    Args:
        result (`dict[str, float]`): the first key is the name of the score; its interval has `_low` and `_high` after
            the name, and the number of samples is `count`. The keys of a group have its name at the end: `count_3x3`.

    Raises:
        ValueError: if a result has no interval.
    """
    name = next(iter(result))
    groups = [key.removeprefix(f"{name}_low") for key in result if key.startswith(f"{name}_low")]
    if not groups:
        raise ValueError(f"The result has {name}, but no {name}_low and {name}_high. Add its interval to the metric.")
    return {
        end.removeprefix("_"): Score(
            name, *(result[f"{key}{end}"] for key in (name, f"{name}_low", f"{name}_high")), int(result[f"count{end}"])
        )
        for end in groups
    }


def plain_rates(result: dict[str, float]) -> list[str]:
    """Names of the rates in a metric's result that have no interval, such as `invalid`, without those of groups."""
    groups = [f"_{group}" for group in scores_by_group(result) if group]
    ends = ("_low", "_high", *groups)
    return [key for key in result if key != "count" and f"{key}_low" not in result and not key.endswith(ends)]
