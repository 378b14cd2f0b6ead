"""The forms of a question: what the assistant says on the way to one and the same answer.

Each form is an arm of a comparison. All of them name the steps in the same words; they differ in what follows each:

| form | after each step |
|---|---|
| `trace` | a helper image, which becomes a span of K latents: K + 2 positions |
| `answer` | nothing, nor are the steps named: the answer alone |
| `text` | the state in words, as many as it takes |
| `text_equal` | the state in K + 2 words: its shortest spelling, filled up with `FILLER` or cut |
| `pads` | `FILLER` K + 2 times: as much computation as a span, and nothing that is fed back |

A word is one token of a tokenizer that was trained on [`Task.texts`]; so `trace`, `text_equal` and `pads` take equally
many positions. In `pads` the places are ordinary words and not `<|latent_pad|>`, so any language model can train on
it.
"""

from collections.abc import Callable, Iterable

from PIL import Image

from ilvr.data.conversations import ConversationBuilder


INSTRUCTIONS = {
    "trace": "Think step by step.",
    "answer": "Answer directly.",
    "text": "Think in words.",
    "text_equal": "Think in few words.",
    "pads": "Think in silence.",
}
FORMS = tuple(INSTRUCTIONS)
FILLER = " …"


def check_form(split: str, form: str, forms: Iterable[str] = FORMS) -> None:
    """Refuses splits and forms that a task does not have.

    Raises:
        ValueError: for an unknown split or form, and for tests in the form `base`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"There is no split {split!r}; choose train or test.")
    if form not in (*forms, "base") or (form, split) == ("base", "test"):
        raise ValueError(f"There is no form {form!r} of the split {split!r}; choose {', '.join(forms)}.")


def check_latent_size(latent_size: int) -> None:
    """Refuses a number of latents that no span has.

    Raises:
        ValueError: if it is below 1.
    """
    if latent_size < 1:
        raise ValueError(
            f"A span has at least one latent, got latent_size {latent_size}. Set the model's: the forms "
            "text_equal and pads are as long as its spans."
        )


def add_step(
    builder: ConversationBuilder,
    form: str,
    step: str,
    *,
    state: str,
    short_state: str | None = None,
    picture: Callable[[], Image.Image],
    latent_size: int,
) -> None:
    """Adds a step of the assistant's way to its answer, and what the form says of the state that it leads to.

    Args:
        builder (`ConversationBuilder`): in a turn of the assistant.
        form (`str`): one of `FORMS`.
        step (`str`): words that name the step and not its result; they start with a space, as all words here do.
        state (`str`): the state after the step in words.
        short_state (`str`, *optional*, defaults to `state`): its shortest spelling, what matters most first.
        picture (`Callable[[], Image]`): draws the state, for `trace`.
        latent_size (`int`): latents K of a span.
    """
    if form == "answer":
        return
    builder.add_text(step, "step")
    if form == "trace":
        builder.add_image(picture(), "step")
    elif form == "text":
        builder.add_text(state, "step")
    else:
        positions = latent_size + 2
        said = [] if form == "pads" else (short_state or state).split()[:positions]
        builder.add_text("".join(f" {word}" for word in said) + FILLER * (positions - len(said)), "step")
