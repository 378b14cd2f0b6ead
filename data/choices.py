"""Questions of multiple choice, in the fields that most benchmarks have: `question`, `options`, `answer`, images."""

from typing import Any

from .conversations import ConversationBuilder, Locate, SampleError, as_list, required
from .reference_jsonl import add_question


OPTIONS = ("options", "choices")
IMAGES = ("image", "images")
LETTERS = "ABCDEFGHIJ"
ASK = "Answer with the letter of the right option in \\boxed{}."


def is_choices(fields: set[str]) -> bool:
    """Whether a row with these fields is a question of multiple choice."""
    return {"question", "answer"} <= fields and len(fields & set(OPTIONS)) == 1 and "messages" not in fields


def read_choices_question(row: dict, locate: Locate) -> dict:
    r"""A row with `question`, `options` or `choices`, `answer` and, optionally, `image` or `images`.

    Args:
        row (`dict`): the row. The answer is a letter, the number of an option, from 0, or the text of one; each
            `<image>` of the question becomes an image, which come first without such marks.
        locate (`Callable`): finds an image, see [`ConversationBuilder`].

    Returns:
        `dict` with `messages`, the question with its options by letter and the wish for a letter in `\boxed{}`,
        `images`, `answer`, a letter, and `metadata`.

    Raises:
        SampleError: names the bad field.
    """
    name = _only_one_of(OPTIONS, row)
    options = as_list(required(row, name), name, str)
    if not 2 <= len(options) <= len(LETTERS):
        raise SampleError(name, f"has {len(options)} options. Give 2 to {len(LETTERS)}.")
    question = required(row, "question")
    if not isinstance(question, str):
        raise SampleError("question", f"must be a text, got {question!r:.80}. Correct the field.")
    lines = [question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options)), ASK]
    images = row.get(_only_one_of(IMAGES, row))
    images = images if isinstance(images, list) or images is None else [images]
    builder = ConversationBuilder(locate)
    add_question(builder, {"text_input": "\n".join(lines), "image_input": images})
    letter = read_letter(required(row, "answer"), options)
    return builder.finish(row, {"question", *IMAGES, "answer"}, letter, answered=False)


def read_letter(answer: Any, options: list[str]) -> str:
    """The letter of the right option: a letter as it is, a number from 0, or an option's text.

    Raises:
        SampleError: if it is none of them.
    """
    letters = LETTERS[: len(options)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return letters[answer]
    if isinstance(answer, str):
        if options.count(answer) == 1:
            return letters[options.index(answer)]
        letter = answer.strip().strip("().").upper()
        if len(letter) == 1 and letter in letters:
            return letter
    raise SampleError(
        "answer", f"{answer!r:.80} is no letter from A to {letters[-1]}, no number below {len(options)} and no option."
    )


def _only_one_of(names: tuple[str, str], row: dict) -> str:
    present = [name for name in names if row.get(name) is not None]
    if len(present) > 1:
        raise SampleError(present[1], f"is there beside {present[0]}. Leave one of them out.")
    return present[0] if present else names[0]
