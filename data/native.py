"""Native rows: TRL's vision conversations, `messages` with image parts and `images` in their order."""

from collections.abc import Callable

from .conversations import ConversationBuilder, SampleError, as_list, required


FIELDS = frozenset({"messages"})


def read_native(row: dict, locate: Callable) -> dict:
    """A row with `messages`, `images` (paths, or `datasets`' dicts) and, optionally, `answer`.

    An image part may name its file itself, as `path` or `image`; such images are not in `images`.

    Args:
        row (`dict`): the row. The content of a turn may also be a plain text.
        locate (`Callable`): finds an image, see [`ConversationBuilder`].

    Returns:
        `dict` with `messages`, `images`, `answer` and `metadata`.

    Raises:
        SampleError: names the bad field.
    """
    images = as_list([] if row.get("images") is None else row["images"], "images")
    builder, taken = ConversationBuilder(locate), 0
    for i, message in enumerate(as_list(required(row, "messages"), "messages", dict)):
        builder.add_turn(message.get("role"), f"messages[{i}].role")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for j, part in enumerate(as_list(parts, f"messages[{i}].content", dict)):
            field = f"messages[{i}].content[{j}]"
            if part.get("type") == "text":
                builder.add_text(part.get("text"), field)
            elif part.get("type") == "image":
                own = next((part[key] for key in ("image", "path") if part.get(key) is not None), None)
                if own is not None:
                    builder.add_image(own, field)
                    continue
                number, taken = taken, taken + 1
                if number == len(images):
                    raise SampleError(
                        field, f"is an image part, but `images` has only {number} images. Add the image."
                    )
                builder.add_image(images[number], f"images[{number}]")
            else:
                raise SampleError(field, f"unknown type {part.get('type')!r}. Use text or image.")
    if taken != len(images):
        raise SampleError(
            "images",
            f"has {len(images)} images for {taken} image parts in `messages`. Add a part for each.",
        )
    return builder.finish(row, {*FIELDS, "images", "answer"}, row.get("answer"))
