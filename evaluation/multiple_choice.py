r"""`evaluate` metric for multiple choice: is the letter in the last \boxed{…}, or in brackets at the end, right?"""

import re

import datasets
import evaluate
from evaluate.utils.file_utils import add_start_docstrings

from ilvr.data.conversations import last_boxed
from ilvr.evaluation.intervals import wilson_interval


_DESCRIPTION = r"""
Compares the letter, A to J, that each output chooses with its reference. The letter is what the last \boxed{...}
holds, or starts with before a dot, colon or bracket, as in \boxed{B}, \boxed{(B)}, \boxed{\text{B}} or \boxed{B. two};
without a box it is the one in brackets at the very end, as in "so it is (B)." Letters elsewhere are not looked for.
"""
_KWARGS_DESCRIPTION = r"""
Args:
    predictions (`list[str]`): model outputs.
    references (`list[str]`): right letters, such as `B` or `(B)`.

Returns:
    `accuracy`; `accuracy_low`, `accuracy_high`: its Wilson 95 % interval; `invalid`: share of outputs that choose
    none, which are wrong; `count`.
"""

_IN_A_BOX = re.compile(r"\s*(?:\\text(?:bf)?\s*\{)?\s*\(?\s*([A-Ja-j])\s*(?:[.:)}].*)?", re.DOTALL)
_AT_THE_END = re.compile(r"\(([A-J])\)[\s.]*$")


@add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MultipleChoice(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    @staticmethod
    def parse(text: str) -> str | None:
        """The letter that an output chooses, or `None`."""
        box = last_boxed(text)
        found = _AT_THE_END.search(text) if box is None else _IN_A_BOX.fullmatch(box)
        return found and found[1].upper()

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        right_letters = [_IN_A_BOX.fullmatch(reference) for reference in references]
        if None in right_letters:
            wrong = references[right_letters.index(None)]
            raise ValueError(
                f"The reference {wrong!r:.80} is no letter from A to J. Correct it, or use another metric."
            )
        chosen = [self.parse(text) for text in predictions]
        count = len(chosen)
        right = sum(letter == found[1].upper() for letter, found in zip(chosen, right_letters) if found)
        low, high = wilson_interval(right, count)
        return {
            "accuracy": right / count,
            "accuracy_low": low,
            "accuracy_high": high,
            "invalid": chosen.count(None) / count,
            "count": count,
        }
