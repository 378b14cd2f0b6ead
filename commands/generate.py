"""`ilvr generate MODEL IMAGE QUESTION`: one answer as it comes, with its spans of latents and what these resemble."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TextStreamer, set_seed
from transformers.utils.logging import disable_progress_bar

from ilvr import ILVRProcessor
from ilvr.data.conversations import last_boxed
from ilvr.data.images import open_image
from ilvr.evaluation import answer_batch, draw_answers
from ilvr.evaluation.auditing import load_checkpoint


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


def run(options: Namespace) -> int:
    """Prints the answer as it is generated or, for machines, when it is done."""
    picture = options.picture and Path(options.picture)
    if picture and (picture.suffix.lower() != ".png" or not picture.parent.is_dir()):
        raise ValueError(f"--picture: {picture} must end in .png, and lie in a folder that exists.")
    image = open_image(options.image, options.image)
    disable_progress_bar()  # of loading
    attention = {} if options.attn_implementation is None else {"attn_implementation": options.attn_implementation}
    model, processor = load_checkpoint(options.model, dtype=options.dtype, **attention)
    question = [{"type": "image"}, {"type": "text", "text": options.question}]
    sample = {"messages": [{"role": "user", "content": question}], "images": [image]}
    streamer = TraceStreamer(processor, (lambda text: None) if options.json else _print_piece)
    set_seed(options.seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": options.temperature} if options.temperature else {}
    settings = {"max_new_tokens": options.max_new_tokens, "streamer": streamer, "output_latents": True, **sampling}
    (answer,) = answer_batch(model, processor, [sample], **settings)
    if picture:
        draw_answers(model, processor, [(sample, answer.text, cast(torch.Tensor, answer.latents))], picture)
    if options.json:
        found = {
            "answer": answer.text,
            "boxed": last_boxed(answer.text),
            "trace": streamer.trace,
            "spans": answer.spans,
            "tokens": answer.tokens,
            "finished": answer.finished,
        }
        print(json.dumps(found | ({"picture": str(picture)} if picture else {}), indent=2))
        return 0
    print()
    if not answer.finished:
        print(f"The answer was cut off after {answer.tokens} tokens: --max_new_tokens.", file=sys.stderr)
    if picture:
        print(f"{picture}: what {answer.spans} spans of latents resemble", file=sys.stderr)
    return 0


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)
