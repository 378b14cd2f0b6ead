r"""`evaluate` metric for tasks with one right answer: is the last \boxed{…} the reference?"""

import datasets
import evaluate
from evaluate.utils.file_utils import add_start_docstrings

from ilvr.data.conversations import last_boxed
from ilvr.evaluation.intervals import wilson_interval


_DESCRIPTION = r"""
Compares the content of the last \boxed{...} of each output with its reference, without spaces at either end and with
one space for several. Nothing else is forgiven: capitals, units and other forms of a number count as differences.
"""
_KWARGS_DESCRIPTION = r"""
Args:
    predictions (`list[str]`): model outputs.
    references (`list[str]`): right answers, without \boxed.

Returns:
    `accuracy`; `accuracy_low`, `accuracy_high`: its Wilson 95 % interval; `invalid`: share of outputs without a box,
    which are wrong; `count`.
"""


@add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BoxedExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        boxes = [last_boxed(text) for text in predictions]
        count = len(boxes)
        right = sum(box is not None and box.split() == reference.split() for box, reference in zip(boxes, references))
        low, high = wilson_interval(right, count)
        return {
            "accuracy": right / count,
            "accuracy_low": low,
            "accuracy_high": high,
            "invalid": boxes.count(None) / count,
            "count": count,
        }
