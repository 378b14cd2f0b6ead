r"""`evaluate` metric for patterns of dots: is the last \boxed{…} the reference, and how many of its words are?"""

import datasets
import evaluate
from evaluate.utils.file_utils import add_start_docstrings

from ilvr.data.conversations import last_boxed
from ilvr.evaluation.intervals import wilson_interval


_DESCRIPTION = r"""
Compares the words in the last \boxed{...} of each output with its reference, as a whole and word by word. A word says
one dot, 0 or 1, or several, a letter.
"""
_KWARGS_DESCRIPTION = r"""
Args:
    predictions (`list[str]`): model outputs.
    references (`list[str]`): right words, such as "0 1 1", without \boxed.

Returns:
    `accuracy`: share of outputs with all words right; `accuracy_low`, `accuracy_high`: its Wilson 95 % interval;
    `word_accuracy`: share of right words, of which a guess has a half if they are bits; `invalid`: share of outputs
    without a box or with another number of words in it: wrong in every word; `count`.
"""


@add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Glyphs(evaluate.Metric):
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
        count, right, invalid, rates = len(predictions), 0, 0, 0.0
        for text, reference in zip(predictions, references):
            words, expected = (last_boxed(text) or "").split(), reference.split()
            if len(words) != len(expected):
                invalid += 1
                continue
            right += words == expected
            rates += sum(one == other for one, other in zip(words, expected)) / len(expected)
        low, high = wilson_interval(right, count)
        return {
            "accuracy": right / count,
            "accuracy_low": low,
            "accuracy_high": high,
            "word_accuracy": rates / count,
            "invalid": invalid / count,
            "count": count,
        }
