"""The page of `ilvr demo`: what it asks of the model, the HTML that it shows, and its parts in Gradio."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.data import prompt_of
from ilvr.data.conversations import last_boxed
from ilvr.data.images import image_size, open_image
from ilvr.evaluation import Questions, draw_answers
from ilvr.evaluation.interventions import compare_words, replace_span, replacements
from ilvr.evaluation.pictures import first_image
from ilvr.evaluation.streaming import CHIP, Trace, stream_answer


MAX_MEGABYTES, MAX_MEGAPIXELS, MAX_CHARACTERS = 10, 16, 4000  # of an upload; of a question
INTRODUCTION = """
<h1>Look into the latents</h1>
<p>This model writes words and, between them, short spans of vectors that are no words: its latents. Ask about a picture,
then click a span to see which cells of the image its latents resemble, and what the answer becomes with something else
in that one span's place. All words are the likeliest ones, so the same latents give the same answer.</p>"""
CONCLUSION = """<p class="soft">Words in colour differ from the original answer. If noise and zeros change nothing, this
answer did not need this span. If they do, something had to stand there; what the latents <em>say</em> shows where another
answer's span brings that answer. One question proves nothing: <code>ilvr audit</code> counts over many.</p>"""
FLIPPED = "of the same question about the mirrored image"
CSS = """
.gradio-container { max-width: 72rem !important; }
.ilvr h1 { font-size: 1.5rem; font-weight: 650; margin: .2rem 0 .4rem; } .ilvr p { margin: .3rem 0; line-height: 1.5; }
.ilvr { overflow-wrap: anywhere; } .ilvr .soft { color: var(--body-text-color-subdued); font-size: .88rem; }
.ilvr .alert { border-left: 4px solid #D55E00; padding: .4rem .8rem; background: var(--block-background-fill); }
.ilvr img { display: block; max-width: 100%; border-radius: 6px; } .ilvr .asked img { width: 20rem; }
.ilvr .trace { font-size: 1.05rem; line-height: 2.1; white-space: pre-wrap; }
.ilvr .chip { display: inline-block; border-radius: 99px; padding: 0 .6em; font-size: .82em; line-height: 1.7;
  color: #fff; background: #0072B2; border: 0; white-space: nowrap; }
.ilvr button.chip:not(:disabled) { cursor: pointer; } .ilvr .chip:disabled { opacity: .55; }
.ilvr button.chip:not(:disabled):hover, .ilvr button.chip:focus-visible { outline: 3px solid #E69F00; }
.ilvr .chip.replaced { background: #D55E00; } .ilvr mark { background: #E69F0066; color: inherit; border-radius: 3px; }
.ilvr table { border-collapse: collapse; width: 100%; margin: .8rem 0; }
.ilvr th, .ilvr td { text-align: left; vertical-align: top; padding: .45rem .8rem .45rem 0;
  border-bottom: 1px solid var(--border-color-primary); }
.ilvr th { font-weight: 600; } .ilvr td:first-child { width: 13rem; } .ilvr td:last-child { white-space: nowrap; }
.ilvr td:nth-child(2) { line-height: 1.9; }
@media (max-width: 40rem) { .ilvr thead { display: none; }
  .ilvr td, .ilvr td:first-child { display: block; width: auto; border: 0; padding: .1rem 0; }
  .ilvr td:first-child { font-weight: 600; } .ilvr td:last-child::before { content: "answer: "; }
  .ilvr tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--border-color-primary); } }
"""
ON_CLICK = """element.addEventListener('click', (event) => {
  const chip = event.target.closest('button.chip');
  if (chip && !chip.disabled) trigger('click', {number: Number(chip.value)});
});"""


@dataclass
class Subject:
    """A picture to ask about: an upload or, with its number, an example."""

    image: Image.Image
    example: int | None = None


@dataclass
class Asked:
    """A question with its answer, and that of the donor of spans once it is known.

    Args:
        sample (`dict`): with `messages` and `images`.
        trace ([`Trace`]): the whole answer.
        example (`int`, *optional*): which one it is.
        donor ([`Trace`], *optional*): whose spans can be swapped in.
        donor_name (`str`): says what the donor answers.
    """

    sample: dict[str, Any]
    trace: Trace
    example: int | None
    donor: Trace | None = None
    donor_name: str = ""


class Demo:
    """What the page asks of a model, as HTML.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        questions ([`Questions`], *optional*): the examples.
        generate_kwargs: passed to `generate`; greedy decoding by default.
    """

    def __init__(
        self,
        model: ILVRForConditionalGeneration,
        processor: ILVRProcessor,
        questions: Questions | None = None,
        **generate_kwargs: Any,
    ) -> None:
        self.model, self.processor, self.questions, self.settings = model, processor, questions, generate_kwargs

    def examples(self) -> list[tuple[str, int]]:
        """Names of the examples, and their numbers."""
        if self.questions is None:
            return []
        task, samples = self.questions.task, self.questions.samples
        return [(f"{i + 1}  {task.group(sample) if task else ''}".strip(), i) for i, sample in enumerate(samples)]

    def choose(self, example: int) -> tuple[Subject, str, str, str, None, str]:
        """The subject, its picture, the question, and an empty answer, of an example."""
        assert self.questions is not None
        sample = self.questions.dataset[example]
        subject = Subject(first_image(sample), example)
        return subject, shown(subject.image), question_in(sample), "", None, ""

    def upload(self, path: str) -> tuple[Subject | None, str, str, None, str]:
        """The same of an upload, for which the question stays."""
        try:
            subject = Subject(read_upload(path))
        except ValueError as error:
            return None, alert(error), "", None, ""
        return subject, shown(subject.image), "", None, ""

    def ask(self, subject: Subject | None, question: str) -> Iterator[tuple[str, Asked | None, str]]:
        """The answer as it grows, as HTML, then what [`Demo.look`] needs."""
        try:
            sample, example = self._sample(subject, question)
            for trace in stream_answer(self.model, self.processor, sample, **self.settings):
                yield trace_html(trace), None if trace.answer is None else Asked(sample, trace, example), ""
        except ValueError as error:
            yield alert(error), None, ""

    def _sample(self, subject: Subject | None, question: str) -> tuple[dict[str, Any], int | None]:
        if subject is None:
            raise ValueError("There is no image yet. Choose an example or upload one.")
        if not question.strip():
            raise ValueError("The question is empty. Write what you want to know about the image.")
        if len(question) > MAX_CHARACTERS:
            raise ValueError(f"The question has {len(question)} characters. Shorten it to {MAX_CHARACTERS}.")
        if subject.example is not None and self.questions is not None:
            sample = self.questions.dataset[subject.example]
            if question == question_in(sample):
                return sample, subject.example
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return {"messages": [{"role": "user", "content": content}], "images": [subject.image]}, None

    def look(self, asked: Asked | None, number: int) -> Iterator[str]:
        """What span `number` (from 1) resembles, and the answers with something else in its place, one by one."""
        if asked is None or asked.trace.answer is None or asked.trace.answer.latents is None:
            return
        own = asked.trace.answer.latents
        if not 1 <= number <= len(own):
            yield alert(f"Span {number} was cut off. Ask with more tokens: --max_new_tokens.")
            return
        try:
            head = f"<h1>Span {number}</h1>{self._picture(asked, number)}"
            yield f"{head}{alert('Answering again …')}"
            if asked.donor is None:
                asked.donor, asked.donor_name = self._donor(asked)
            rows = [row(f"its own span {number}: the original answer", asked.trace, asked.trace, 0)]
            for replacement in replacements(own[number - 1], *self._donor_span(asked, number)):
                yield head + table(number, rows) + alert(f"Answering again, with {replacement.label} …")
                change = {}
                if replacement.latents is not None:
                    change["latent_intervention"] = replace_span(number - 1, replacement.latents)
                *_, trace = stream_answer(self.model, self.processor, asked.sample, **self.settings, **change)
                rows.append(row(replacement.label, trace, asked.trace, number if change else 0))
            yield head + table(number, rows) + CONCLUSION
        except ValueError as error:
            yield alert(error)

    def _picture(self, asked: Asked, number: int) -> str:
        answer, task = asked.trace.answer, self.questions.task if self.questions else None
        assert answer is not None and answer.latents is not None
        meant = task.draw(asked.sample, answer.text)[number - 1 : number] if task and asked.example is not None else []
        note = "the picture that the task means by this span, which the model does not see" if meant else "the image"
        meant = meant or [(f"span {number}", first_image(asked.sample))]
        span = answer.latents[number - 1 : number]
        draw_answers(
            self.model,
            self.processor,
            [(asked.sample, answer.text, span)],
            file := io.BytesIO(),
            draw=lambda sample, answer: meant,
        )
        note = f"Right: {note}, each cell in the colour of how much the nearest latent resembles it (cosine)."
        return f"{img(file.getvalue(), f'Cells that the latents of span {number} resemble')}<p class='soft'>{note}</p>"

    def _donor(self, asked: Asked) -> tuple[Trace, str]:
        """The next example that has another right answer or, without examples, the question on the mirrored image."""
        if asked.example is None or self.questions is None:
            first, *others = asked.sample["images"]
            sample = {**asked.sample, "images": [ImageOps.mirror(open_image(first, "The image")), *others]}
            name = FLIPPED
        else:
            right, count = self.questions.references, len(self.questions)
            following = ((asked.example + step) % count for step in range(1, count))
            other = next((i for i in following if right[i] != right[asked.example]), None)
            if other is None:
                raise ValueError("All examples have the same right answer. Choose more: --examples.")
            sample, name = self.questions.dataset[other], f"of example {other + 1}"
        *_, trace = stream_answer(self.model, self.processor, sample, **self.settings)
        return trace, name

    def _donor_span(self, asked: Asked, number: int) -> tuple[Any, str]:
        assert asked.donor is not None and asked.donor.answer is not None and asked.donor.answer.latents is not None
        answer, latents = asked.donor.answer, asked.donor.answer.latents
        if not len(latents):
            raise ValueError(f"The answer {asked.donor_name} has no span to swap in. Choose another question or image.")
        given = min(number, len(latents))
        says = last_boxed(answer.text)
        return latents[given - 1], f"span {given} {asked.donor_name}" + (f", whose answer is {says}" if says else "")


# --------------------------------------------------------------------------------------------------- questions, images


def question_in(sample: dict[str, Any]) -> str:
    """The words of a question."""
    parts = [part for message in prompt_of(sample) for part in message["content"]]
    return "\n".join(part["text"] for part in parts if part["type"] == "text").strip()


def read_upload(path: str) -> Image.Image:
    """Decodes an upload.

    Raises:
        ValueError: if it is no image, or too large, which its header tells before anything is decoded.
    """
    data = Path(path).read_bytes()
    if len(data) > MAX_MEGABYTES * 1_000_000:
        raise ValueError(f"The upload has {len(data) / 1e6:.1f} MB. Shrink it to {MAX_MEGABYTES} MB.")
    width, height = image_size({"bytes": data}, "The upload")
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise ValueError(f"The upload has {width} x {height} pixels. Shrink it to {MAX_MEGAPIXELS} megapixels.")
    return open_image({"bytes": data}, "The upload")


# ----------------------------------------------------------------------------------------------------------------- HTML


def alert(message: object) -> str:
    """A line that a screen reader says at once."""
    return f'<p class="alert" role="alert">{escape(str(message))}</p>'


def img(png: bytes, text: str) -> str:
    """A picture inside the page, with the text that stands for it."""
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def shown(image: Image.Image) -> str:
    """The image that is asked about."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((640, 640))
    small.save(file, "PNG")
    return f'<div class="asked">{img(file.getvalue(), "The image that is asked about")}</div>'


def trace_html(trace: Trace) -> str:
    """An answer with a button for each span, which can be clicked once it is whole."""
    state = "disabled" if trace.answer is None else ""
    words = escape(trace.text)
    found = CHIP.sub(rf'<button class="chip" value="\1" {state}>latent \1</button>', words)
    if trace.answer is None:
        return f'<div class="trace">{found}</div>'
    answer = trace.answer
    note = "Click a span." if answer.spans else "This answer has no span of latents: nothing to look into."
    note += "" if answer.finished else f" Cut off after {answer.tokens} tokens: --max_new_tokens."
    return f'<div class="trace done">{found}</div><p class="soft">{note}</p>'


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
    return f"<tr><td>{escape(label)}</td><td>{words}</td><td>{answer if box == before else f'<mark>{answer}</mark>'}</td></tr>"


def table(number: int, rows: Sequence[str]) -> str:
    """The answers side by side."""
    head = f"<tr><th>in the place of span {number}</th><th>the model says</th><th>answer</th></tr>"
    return f'<table class="answers"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


# --------------------------------------------------------------------------------------------------------------- Gradio


def build_page(demo: Demo) -> gr.Blocks:
    """The page, which answers one question at a time, whoever asks."""
    one = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private", "show_progress": "hidden"}

    def look(asked: Asked | None, event: gr.EventData) -> Iterator[str]:
        yield from demo.look(asked, int(event.number))

    with gr.Blocks(title="ILVR: look into the latents", analytics_enabled=False) as page:
        subject, asked = gr.State(), gr.State()
        gr.HTML(INTRODUCTION, elem_classes="ilvr")
        with gr.Row():
            with gr.Column(min_width=300):
                examples = demo.examples()
                example = gr.Dropdown(
                    examples, value=0 if examples else None, label="Example", elem_id="example", visible=bool(examples)
                )
                picture = gr.HTML(elem_classes="ilvr", elem_id="picture")
                upload = gr.UploadButton(
                    f"Upload an image (up to {MAX_MEGABYTES} MB)", file_types=["image"], elem_id="upload", size="sm"
                )
            with gr.Column(min_width=300, scale=2):
                question = gr.Textbox(label="Question", lines=3, elem_id="question", max_length=MAX_CHARACTERS)
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                trace = gr.HTML(elem_classes="ilvr", elem_id="trace", js_on_load=ON_CLICK)
        panel = gr.HTML(elem_classes="ilvr", elem_id="panel")
        answer = [trace, asked, panel]
        asking = gr.on([ask.click, question.submit], demo.ask, [subject, question], answer, **one)
        looking = trace.click(look, asked, panel, trigger_mode="always_last", **one)
        stop = {"cancels": [asking, looking], "api_visibility": "private", "show_progress": "hidden"}
        upload.upload(demo.upload, upload, [subject, picture, *answer], **stop)
        if examples:
            chosen = [subject, picture, question, *answer]
            page.load(demo.choose, example, chosen, api_visibility="private", show_progress="hidden")
            example.input(demo.choose, example, chosen, **stop)
    return page


def serve(demo: Demo, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> tuple[gr.Blocks, str]:
    """Starts to serve the page, whose fonts, scripts and styles all come from here.

    Returns:
        `tuple`: the page, and its address.
    """
    page = build_page(demo)
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=f"{MAX_MEGABYTES}mb",
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
    )
    return page, public or local
