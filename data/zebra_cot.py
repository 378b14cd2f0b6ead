"""Zebra-CoT (Hub: multimodal-reasoning-lab/Zebra-CoT, arXiv 2507.16746): a text trace that refers to numbered images.

Columns: `Question`, `Text Reasoning Trace`, `Final Answer`, `problem_image_1`, …, `reasoning_image_1`, …; unused image
columns are null. Texts name an image as `<image_start>[reasoning_image_1]<image_end>`.
"""

import re

from .conversations import ConversationBuilder, Locate, SampleError, required


FIELDS = frozenset({"Question", "Text Reasoning Trace"})
_MARK = re.compile(r"<image_start>\[(\w+)\]<image_end>")
_IMAGE_COLUMN = re.compile(r"(problem|reasoning)_image_(\d+)")


def read_zebra_cot(row: dict, locate: Locate) -> dict:
    """A row of Zebra-CoT; the trace ends with `The final answer is: …`, which the trace itself does not say.

    Problem images that the question does not name come first. A problem image named in the trace is left out there:
    the model has it already, and an image of the assistant's turn would be a latent span.

    Args:
        row (`dict`): the row; images are paths or `datasets`' dicts.
        locate (`Callable`): finds an image, see [`ConversationBuilder`].

    Returns:
        `dict` with `messages`, `images`, `answer` and `metadata`.

    Raises:
        SampleError: names the bad field.
    """
    question, trace = required(row, "Question"), required(row, "Text Reasoning Trace")
    answer = required(row, "Final Answer")
    numbers = {name: match for name in row if row[name] is not None and (match := _IMAGE_COLUMN.fullmatch(name))}
    columns = sorted(numbers, key=lambda name: int(numbers[name][2]))
    builder = ConversationBuilder(locate)
    builder.add_turn("user", "Question")
    named = _MARK.findall(question) if isinstance(question, str) else []
    for name in columns:
        if name.startswith("problem") and name not in named:
            builder.add_image(row[name], name)
    _add_trace(builder, row, question, "Question", "problem", columns)
    builder.add_turn("assistant", "Text Reasoning Trace")
    shown = _add_trace(builder, row, trace, "Text Reasoning Trace", "reasoning", columns)
    for name in columns:
        if name.startswith("reasoning") and name not in shown:
            raise SampleError(
                name,
                f"the trace does not say where it belongs. Add <image_start>[{name}]<image_end>, or leave it out.",
            )
    builder.add_text(f"\n\nThe final answer is: {answer}", "Final Answer")
    return builder.finish(row, {*FIELDS, "Final Answer", *columns}, answer)


def _add_trace(
    builder: ConversationBuilder, row: dict, text: object, field: str, kind: str, columns: list[str]
) -> set[str]:
    """Adds a text with its images of one kind, `problem` or `reasoning`; returns the names of these images."""
    if not isinstance(text, str):
        builder.add_text(text, field)  # raises
        return set()
    shown = set()
    pieces = _MARK.split(text)  # text, name, text, …, text
    for piece, name in zip(pieces[::2], [*pieces[1::2], None]):
        builder.add_text(piece, field)
        if name is None:
            continue
        if name not in columns:
            raise SampleError(field, f"names {name}, but the row has no such image. Add it or leave the sample out.")
        if name.startswith(kind):
            builder.add_image(row[name], name)
            shown.add(name)
        elif kind == "problem":
            raise SampleError(field, f"names {name}, which would show a step of the answer. Remove it.")
    return shown
