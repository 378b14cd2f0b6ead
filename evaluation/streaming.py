"""An answer while it is generated, with its spans of latents as chips between the words."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from transformers import TextStreamer

from ilvr import ILVRForConditionalGeneration, ILVRProcessor

from .generation import Answer, answer_batch


CHIP = re.compile(r"\[latent (\d+)\]")


class TraceStreamer(TextStreamer):
    """Gives words as they come and, for each span of latents, a chip such as `[latent 1]`.

    Args:
        processor ([`ILVRProcessor`]): of the model that generates, for one prompt.
        show (`Callable[[str], None]`): takes each piece of text.
    """

    def __init__(self, processor: ILVRProcessor, show: Callable[[str], None]) -> None:
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.latent_ids, self.show = processor.latent_token_ids, show
        self.trace, self.spans = "", 0

    def put(self, value: torch.Tensor) -> None:
        token = value.flatten()[-1].item()
        if self.next_tokens_are_prompt or token not in self.latent_ids:
            super().put(value)
        elif token == self.latent_ids[0]:
            self.end()  # the words before the span
            self.next_tokens_are_prompt = False
            self.spans += 1
            self._write(f"[latent {self.spans}]")

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)

    def _write(self, text: str) -> None:
        # Around a chip there is a space, wherever the tokenizer puts those of words.
        beside_chip = text.startswith("[latent ") or self.trace.endswith(f"[latent {self.spans}]")
        if beside_chip and self.trace and not self.trace[-1].isspace() and not text[0].isspace():
            text = f" {text}"
        text = text if self.trace else text.lstrip()
        self.trace += text
        self.show(text)


@dataclass(frozen=True)
class Trace:
    """An answer to one question, whole or as far as it is.

    Args:
        text (`str`): the words, and a chip for each span.
        answer ([`Answer`], *optional*): with its latents, once it is whole.
    """

    text: str
    answer: Answer | None = None


def stream_answer(
    model: ILVRForConditionalGeneration, processor: ILVRProcessor, sample: dict[str, Any], **generate_kwargs: Any
) -> Iterator[Trace]:
    """The answer to the first question of a sample as it grows; the last [`Trace`] is whole and has its latents.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        sample (`dict`): with `messages` and `images`.
        generate_kwargs: passed to `generate`; greedy decoding by default.
    """
    pieces: SimpleQueue[str | None] = SimpleQueue()
    streamer = TraceStreamer(processor, pieces.put)
    settings = {**generate_kwargs, "streamer": streamer, "output_latents": True}
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(answer_batch, model, processor, [sample], **settings)
        answering.add_done_callback(lambda _: pieces.put(None))
        text = ""
        while (piece := pieces.get()) is not None:
            text += piece
            yield Trace(text)
        yield Trace(text, *answering.result())
