"""What suites ask of a checkpoint: texts for messages, thought with its own latents or with a control's."""

from typing import Any

from ilvr.evaluation.auditing import load_checkpoint
from ilvr.evaluation.controls import CONTROLS, ControlInputs
from ilvr.evaluation.generation import Answer, answer_conversations
from ilvr.evaluation.records import OWN


# The controls that need no other answers and no helper images.
LATENTS = (OWN, "noise_0.1", "noise_0.3", "noise_1.0", "zeros", "markers_only", "no_spans", "hidden_image")
SAMPLING = ("temperature", "top_p", "top_k", "min_p")


class Answering:
    """A checkpoint that answers batches of messages.

    Args:
        checkpoint (`str`): folder or Hub id of an ILVR checkpoint.
        latents (`str`, *optional*, defaults to `"own"`): what its spans hold, its own latents or those of a control.
        seed (`int`, *optional*, defaults to 0): of noise.
        model_kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: for other `latents`, and a checkpoint that is not one of ILVR.
    """

    def __init__(self, checkpoint: str, *, latents: str = OWN, seed: int = 0, **model_kwargs: Any) -> None:
        if latents not in LATENTS:
            raise ValueError(f"latents must be one of {', '.join(LATENTS)}, got {latents!r}.")
        self.model, self.processor = load_checkpoint(checkpoint, **model_kwargs)
        self.latents, self.seed, self.answered = latents, seed, 0

    def __call__(self, conversations: list[list[dict[str, Any]]], **generate_kwargs: Any) -> list[Answer]:
        """Answers to messages as `apply_chat_template` takes them; arguments as for `generate`."""
        for conversation in conversations:
            _check(conversation)
        settings = {**decoding(generate_kwargs), **self._control(len(conversations))}
        return answer_conversations(self.model, self.processor, conversations, **settings)

    def _control(self, count: int) -> dict[str, Any]:
        first, self.answered = self.answered, self.answered + count
        if self.latents == OWN:
            return {}
        start_id, pad_id, _ = self.processor.latent_token_ids
        embeddings: Any = self.model.get_input_embeddings()
        pad = embeddings.weight[pad_id].detach()
        return CONTROLS[self.latents](
            ControlInputs(range(first, self.answered), [], None, pad_embedding=pad, start_id=start_id, seed=self.seed)
        )


def decoding(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` without what is not given, and without those of sampling where nothing is drawn."""
    given = {name: value for name, value in settings.items() if value is not None}
    given["do_sample"] = given.get("do_sample", given.get("temperature", 0) > 0) and given.get("temperature", 1) > 0
    return given if given["do_sample"] else {name: value for name, value in given.items() if name not in SAMPLING}


def _check(conversation: list[dict[str, Any]]) -> None:
    for message in conversation:
        for part in [] if isinstance(message["content"], str) else message["content"]:
            if part["type"] not in ("text", "image"):
                raise ValueError(f"A question has a part of type {part['type']!r}. Choose tasks of texts and images.")
            if part["type"] == "image" and message["role"] == "assistant":
                raise ValueError("An assistant turn of a question shows an image. Choose tasks whose examples do not.")
