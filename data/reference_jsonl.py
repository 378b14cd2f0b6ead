"""The JSONL of the paper's original code (CoMT, VSP-CoT): `sequence_plan` interleaves texts and helper images."""

from .conversations import ConversationBuilder, Locate, SampleError, as_list, required


FIELDS = frozenset({"text_input", "sequence_plan"})
IMAGE_MARK = "<image>"


def read_reference(row: dict, locate: Locate) -> dict:
    """A row with `text_input`, `image_input`, `sequence_plan` and, optionally, `original_final_answer`.

    Args:
        row (`dict`): the row. A step of `sequence_plan` is `{"type": "text", "content": …}` or
            `{"type": "latent", "helper_image": path}`.
        locate (`Callable`): finds an image, see [`ConversationBuilder`].

    Returns:
        `dict` with `messages`, `images`, `answer` and `metadata`.

    Raises:
        SampleError: names the bad field.
    """
    builder = ConversationBuilder(locate)
    add_question(builder, row)
    builder.add_turn("assistant", "sequence_plan")
    for i, step in enumerate(as_list(required(row, "sequence_plan"), "sequence_plan", dict)):
        field = f"sequence_plan[{i}]"
        if step.get("type") == "text":
            builder.add_text(step.get("content"), f"{field}.content")
        elif step.get("type") == "latent":
            builder.add_image(step.get("helper_image"), f"{field}.helper_image")
        else:
            raise SampleError(f"{field}.type", f"unknown type {step.get('type')!r}. Use text or latent.")
    used = {*FIELDS, "image_input", "original_final_answer"}
    return builder.finish(row, used, row.get("original_final_answer"))


def read_question(row: dict, locate: Locate) -> dict:
    """A row to evaluate on, without `sequence_plan`: `text_input`, `image_input` and `original_final_answer`.

    Raises:
        SampleError: names the bad field.
    """
    builder = ConversationBuilder(locate)
    add_question(builder, row)
    used = {"text_input", "image_input", "original_final_answer"}
    return builder.finish(row, used, row.get("original_final_answer"), answered=False)


def add_question(builder: ConversationBuilder, row: dict) -> None:
    """The user's turn: each `<image>` of `text_input` becomes an image; without such marks the images come first."""
    text, images = required(row, "text_input"), row.get("image_input")
    images = [] if images is None else [images] if isinstance(images, str) else as_list(images, "image_input")
    located = [(image, f"image_input[{i}]") for i, image in enumerate(images)]
    builder.add_turn("user", "text_input")
    if isinstance(text, str) and IMAGE_MARK in text:
        builder.add_marked_text(text, IMAGE_MARK, located, "text_input")
    else:
        for image in located:
            builder.add_image(*image)
        builder.add_text(text, "text_input")
