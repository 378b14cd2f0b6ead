"""`ilvr generate MODEL IMAGE QUESTION`: one answer as it comes, with its spans of latents and what these resemble."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from ilvr.data.conversations import last_boxed
from ilvr.data.images import open_image
from ilvr.evaluation import answer_batch, draw_answers
from ilvr.evaluation.auditing import load_checkpoint
from ilvr.evaluation.streaming import TraceStreamer


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
        row = sample, answer.text, cast(torch.Tensor, answer.latents)
        draw_answers(model, processor, [row], picture, max_spans=answer.spans)
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
