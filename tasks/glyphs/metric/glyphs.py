r"""`evaluate` metric for patterns of dots: is the last \boxed{…} the reference, and how many of its bits are?"""

import datasets
import evaluate
from evaluate.utils.file_utils import add_start_docstrings

from ilvr.data.conversations import last_boxed
from ilvr.evaluation.intervals import wilson_interval


_DESCRIPTION = r"""
Compares the bits in the last \boxed{...} of each output with its reference, as a whole and bit by bit. Bits are 0 or
1, with spaces between them.
"""
_KWARGS_DESCRIPTION = r"""
Args:
    predictions (`list[str]`): model outputs.
    references (`list[str]`): right bits, such as "0 1 1", without \boxed.

Returns:
    `accuracy`: share of outputs with all bits right; `accuracy_low`, `accuracy_high`: its Wilson 95 % interval;
    `bit_accuracy`: share of right bits, of which a guess has a half; `invalid`: share of outputs without a box, with
    another number of bits, or with anything else in it: wrong in every bit; `count`.
"""


def parse_bits(text: str) -> list[str] | None:
    r"""The bits in the last `\boxed{…}`, or `None` if there is no box or something else in it."""
    bits = (last_boxed(text) or "-").split()
    return bits if set(bits) <= {"0", "1"} else None


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
            bits, expected = parse_bits(text), reference.split()
            if bits is None or len(bits) != len(expected):
                invalid += 1
                continue
            right += bits == expected
            rates += sum(one == other for one, other in zip(bits, expected)) / len(expected)
        low, high = wilson_interval(right, count)
        return {
            "accuracy": right / count,
            "accuracy_low": low,
            "accuracy_high": high,
            "bit_accuracy": rates / count,
            "invalid": invalid / count,
            "count": count,
        }
