"""What the page of `ilvr demo` shows, as HTML."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from ilvr.data.conversations import last_boxed
from ilvr.evaluation.interventions import compare_words
from ilvr.evaluation.streaming import CHIP, Trace


INTRODUCTION = """
<h1>Look into the latents</h1>
<p>This model writes words and, between them, short spans of vectors that are no words: its latents. Ask about a
picture, then click a span to see which cells of the image its latents resemble, and what the answer becomes with
something else in that one span's place. All words are the likeliest ones, so the same latents give the same
answer.</p>
"""
CONCLUSION = """
<p class="soft">Words in colour differ from the original answer. If noise and zeros change nothing, this answer did not
need this span. If they do, something had to stand there; what the latents <em>say</em> shows where the span of another
answer changes this one accordingly. One question proves nothing: <code>ilvr audit</code> counts over many.</p>
"""
CSS = """
.gradio-container { max-width: 72rem !important; }
.ilvr h1, .ilvr h2 { font-size: 1.5rem; font-weight: 650; margin: .2rem 0 .4rem; }
.ilvr h2 { font-size: 1.25rem; } .ilvr p { margin: .3rem 0; line-height: 1.5; }
.ilvr { overflow-wrap: anywhere; } .ilvr .soft { color: inherit; opacity: .75; font-size: .88rem; }
.ilvr .alert { border-left: 4px solid #D55E00; padding: .4rem .8rem; background: var(--block-background-fill); }
.ilvr img { display: block; max-width: 100%; border-radius: 6px; } .ilvr .asked img { width: 20rem; }
.ilvr .trace { font-size: 1.05rem; line-height: 2.1; white-space: pre-wrap; }
.ilvr .chip { display: inline-block; border-radius: 99px; padding: 0 .6em; font-size: .82em; line-height: 1.7;
  color: #fff; background: #0072B2; border: 0; white-space: nowrap; }
.ilvr button.chip:not(:disabled) { cursor: pointer; } .ilvr .chip:disabled { opacity: .55; }
.ilvr button.chip:not(:disabled):hover, .ilvr button.chip:focus-visible { outline: 3px solid #E69F00; }
.ilvr .chip.replaced { background: #D55E00; } .ilvr mark { background: #E69F0066; color: inherit; border-radius: 3px; }
.ilvr table { border-collapse: collapse; width: 100%; margin: .8rem 0; border: 0; }
.ilvr th, .ilvr td { text-align: left; vertical-align: top; padding: .45rem .8rem .45rem 0; border: 0;
  border-bottom: 1px solid var(--border-color-primary); }
.ilvr tr, .ilvr thead, .ilvr tbody { border: 0; }
.ilvr th { font-weight: 600; } .ilvr td:first-child { width: 13rem; } .ilvr td:last-child { white-space: nowrap; }
.ilvr td:nth-child(2) { line-height: 1.9; }
@media (max-width: 40rem) { .ilvr thead { display: none; }
  .ilvr td, .ilvr td:first-child { display: block; width: auto; border: 0; padding: .1rem 0; }
  .ilvr td:first-child { font-weight: 600; } .ilvr td:last-child::before { content: "answer: "; }
  .ilvr tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--border-color-primary); } }
"""


def alert(message: object) -> str:
    """A line that a screen reader says at once."""
    return f'<p class="alert" role="alert">{escape(str(message))}</p>'


def as_image(png: bytes, text: str) -> str:
    """A picture inside the page, with the text that stands for it."""
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def shown(image: Image.Image) -> str:
    """The image that is asked about."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((640, 640))
    small.save(file, "PNG")
    return f'<div class="asked">{as_image(file.getvalue(), "The image that is asked about")}</div>'


def trace_html(trace: Trace, mark: str = "") -> str:
    """An answer with a button for each span, which can be clicked once it is whole."""
    state = "disabled" if trace.answer is None else ""
    words = escape(trace.text)
    found = CHIP.sub(rf'<button class="chip" value="\1" {state}>latent \1</button>', words)
    if trace.answer is None:
        return f'<div class="trace">{found}</div>'
    answer = trace.answer
    note = "Click a span." if answer.spans else "This answer has no span of latents: nothing to look into."
    note = f"{mark} {note}" + ("" if answer.finished else f" Cut off after {answer.tokens} tokens: --max_new_tokens.")
    return f'<div class="trace done">{found}</div><p class="soft">{escape(note)}</p>'


def row(label: str, trace: Trace, original: Trace, replaced: int) -> str:
    """A line of the table: what stood in the span, the words, those that changed marked, and the answer in the box."""

    def word(text: str, changed: bool) -> str:
        chip = CHIP.fullmatch(text)
        if chip:
            kind = "chip replaced" if int(chip[1]) == replaced else "chip"
            return f'<span class="{kind}">{chip[1]}</span>'
        return f"<mark>{escape(text)}</mark>" if changed else escape(text)

    words = " ".join(word(*pair) for pair in compare_words(original.text, trace.text))
    box, before = last_boxed(trace.text), last_boxed(original.text)
    answer = "none" if box is None else escape(box)
    cells = escape(label), words, answer if box == before else f"<mark>{answer}</mark>"
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def table(number: int, rows: Sequence[str]) -> str:
    """The answers side by side."""
    head = f"<tr><th>in the place of span {number}</th><th>the model says</th><th>answer</th></tr>"
    return f'<table class="answers"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
