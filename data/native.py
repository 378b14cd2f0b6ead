"""Native rows: TRL's vision conversations, `messages` with image parts and `images` in their order."""

from .conversations import ConversationBuilder, Locate, SampleError, as_list, required


FIELDS = frozenset({"messages"})


def read_native(row: dict, locate: Locate) -> dict:
    """A row with `messages`, `images` (paths, or `datasets`' dicts) and, optionally, `answer`.

    Args:
        row (`dict`): the row. The content of a turn may also be a plain text, and an
            image part may name its own file, `{"type": "image", "path": …}`, instead of one of `images`.
        locate (`Callable`): finds an image, see [`ConversationBuilder`].

    Returns:
        `dict` with `messages`, `images`, `answer` and `metadata`.

    Raises:
        SampleError: names the bad field.
    """
    images = [] if row.get("images") is None else as_list(row["images"], "images")
    num_used = 0
    builder = ConversationBuilder(locate)
    for i, message in enumerate(as_list(required(row, "messages"), "messages", dict)):
        builder.add_turn(message.get("role"), f"messages[{i}].role")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for j, part in enumerate(as_list(parts, f"messages[{i}].content", dict)):
            field = f"messages[{i}].content[{j}]"
            if part.get("type") == "text":
                builder.add_text(part.get("text"), field)
            elif part.get("type") == "image":
                if part.get("path") is not None:
                    builder.add_image(part["path"], f"{field}.path")
                    continue
                if num_used == len(images):
                    raise SampleError(
                        field,
                        f"is an image part, but `images` has only {num_used} images. Add the image, or its path.",
                    )
                builder.add_image(images[num_used], f"images[{num_used}]")
                num_used += 1
            else:
                raise SampleError(field, f"unknown type {part.get('type')!r}. Use text or image.")
    if num_used != len(images):
        raise SampleError(
            "images",
            f"has {len(images)} images for {num_used} image parts without a path in `messages`. Add a part for each.",
        )
    return builder.finish(row, {*FIELDS, "images", "answer"}, row.get("answer"))
