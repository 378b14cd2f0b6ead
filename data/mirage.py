"""Mirage's JSONL (arXiv 2506.17218): one helper image, in the place of `<output_image>` in the answer."""

from .conversations import ConversationBuilder, Locate, last_boxed, required
from .reference_jsonl import add_question


FIELDS = frozenset({"text_input", "text_output"})
HELPER_MARK = "<output_image>"


def read_mirage(row: dict, locate: Locate) -> dict:
    r"""A row with `text_input`, `image_input`, `text_output` and `image_output`.

    Args:
        row (`dict`): the row; `image_input` is a path or a list of them, `image_output` a path. The answer is what the
            last `\boxed{…}` of `text_output` holds.
        locate (`Callable`): finds an image, see [`ConversationBuilder`].

    Returns:
        `dict` with `messages`, `images`, `answer` and `metadata`.

    Raises:
        SampleError: names the bad field.
    """
    builder = ConversationBuilder(locate)
    add_question(builder, row)
    builder.add_turn("assistant", "text_output")
    text, helper = required(row, "text_output"), row.get("image_output")
    builder.add_marked_text(text, HELPER_MARK, [(helper, "image_output")] if helper is not None else [], "text_output")
    return builder.finish(row, {*FIELDS, "image_input", "image_output"}, last_boxed(text))
