"""The common form of all sources: TRL's vision conversations.

`messages` has turns of parts, `{"type": "text", "text": …}` or `{"type": "image"}`; `images` are in the order of the
image parts. An image part in an assistant turn is a helper image, the target of a latent span.
"""

import json
from collections.abc import Callable
from typing import Any

from datasets import Features, Image, List, Value

from ilvr.configuration_ilvr import LATENT_TOKENS


Locate = Callable[[object, str], dict]  # finds an image by its value; the second argument names its field
ROLES = ("system", "user", "assistant")
FEATURES = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Image(decode=False)),
        "answer": Value("string"),
        "metadata": Value("string"),
    }
)


class SampleError(ValueError):
    """What is wrong with one field of a sample, and how to mend it."""

    def __init__(self, field: str, problem: str) -> None:
        # What a row holds may be no valid Unicode, and must not break the printing of its error.
        super().__init__(f"{field}: {problem}".encode(errors="backslashreplace").decode())
        self.field = field


class ConversationBuilder:
    """Puts a conversation together, turn by turn and part by part.

    Args:
        locate (`Callable[[value, field], dict]`): finds an image, see [`~ilvr.data.images.locate_image`].
    """

    def __init__(self, locate: Locate) -> None:
        self.locate = locate
        self.messages: list[dict] = []
        self.images: list[dict] = []

    def add_turn(self, role: str, field: str) -> None:
        """Starts a turn; parts are added to it.

        Raises:
            SampleError: if the role is none of system, user and assistant.
        """
        if role not in ROLES:
            raise SampleError(field, f"unknown role {role!r}. Use one of {', '.join(ROLES)}.")
        self.messages.append({"role": role, "content": []})

    def add_text(self, text: object, field: str) -> None:
        """Adds a text part; none for an empty text.

        Raises:
            SampleError: if it is no text, or holds one of the latent tokens, which stand for images.
        """
        if not isinstance(text, str):
            raise SampleError(field, f"must be a text, got {text!r:.80}. Correct the field or leave the sample out.")
        _check_unicode(text, field)
        # A token may be cut over parts: the chat template joins those that no image separates.
        joined = text
        for part in reversed(self.messages[-1]["content"]):
            if part["type"] != "text":
                break
            joined = part["text"] + joined
        found = [token for token in LATENT_TOKENS if token in joined]
        if found:
            raise SampleError(
                field, f"the text holds {found[0]}. Latent tokens are made from images; remove them from the text."
            )
        if text:
            self.messages[-1]["content"].append({"type": "text", "text": text})

    def add_image(self, value: object, field: str) -> None:
        """Adds an image part; see [`~ilvr.data.images.locate_image`] for the values and errors."""
        self.images.append(self.locate(value, field))
        self.messages[-1]["content"].append({"type": "image", "text": None})

    def add_marked_text(self, text: object, mark: str, images: list[tuple[object, str]], field: str) -> None:
        """Adds a text with an image in the place of each mark.

        Args:
            text (`str`): the text.
            mark (`str`): stands for an image.
            images (`list[tuple]`): value and field of each image, in order.
            field (`str`): names the text in errors.

        Raises:
            SampleError: if there are not as many marks as images.
        """
        pieces = text.split(mark) if isinstance(text, str) else [text]
        if len(pieces) - 1 != len(images):
            raise SampleError(
                field,
                f"the text has {len(pieces) - 1} times {mark}, but there are {len(images)} images. Mark each once.",
            )
        for piece, image in zip(pieces, [*images, None]):
            self.add_text(piece, field)
            if image is not None:
                self.add_image(*image)

    def finish(self, row: dict, used: set[str], answer: object, *, answered: bool = True) -> dict:
        """The sample with the columns of `FEATURES`.

        Args:
            row (`dict`): the row it was made from.
            used (`set[str]`): fields of the row that are in the conversation; the others go to `metadata`, as JSON.
            answer (`str`, *optional*): the final answer.
            answered (`bool`, *optional*, defaults to `True`): whether there is an assistant's turn; a question to
                evaluate on needs none.

        Raises:
            SampleError: if there is nothing to answer, or nothing to learn from, or the answer is no valid Unicode.
        """
        has_words = {m["role"] for m in self.messages if any((p["text"] or "").strip() for p in m["content"])}
        for role in ("user", "assistant") if answered else ("user",):
            # An image alone asks nothing and answers nothing.
            if role not in has_words:
                raise SampleError(f"{role} turn", "has no words. Add them or leave the sample out.")
        answer = None if answer is None else str(answer)
        _check_unicode(answer or "", "answer")
        metadata = {name: value for name, value in row.items() if name not in used and value is not None}
        return {
            "messages": self.messages,
            "images": self.images,
            "answer": answer,
            "metadata": json.dumps(metadata, default=str),
        }


def image_roles(messages: list[dict]) -> list[str]:
    """The role of the turn of each image part, in order; an assistant's image is a helper image.

    Args:
        messages (`list[dict]`): a conversation; contents are texts or lists of parts.
    """
    return [
        message["role"]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def _check_unicode(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape but no file can store
        raise SampleError(field, f"the text is no valid Unicode: {error}. Correct it.") from error


def required(row: dict, field: str) -> Any:
    """A field that a row must have.

    Raises:
        SampleError: if it is missing or null.
    """
    if row.get(field) is None:
        raise SampleError(field, f"is missing; the row has {', '.join(map(str, row)) or 'no fields'}. Add it.")
    return row[field]


def as_list(value: object, field: str, of: type = object) -> list:
    """A list of objects of one type.

    Raises:
        SampleError: if it is no list, or one of its elements has another type.
    """
    if not isinstance(value, list):
        raise SampleError(field, f"must be a list, got {value!r:.80}. Correct the field.")
    for i, element in enumerate(value):
        if not isinstance(element, of):
            raise SampleError(f"{field}[{i}]", f"must be a {of.__name__}, got {element!r:.80}. Correct the field.")
    return value


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{…}` of a text holds, braces balanced; `None` without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None
