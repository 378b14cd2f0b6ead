"""What the page of `ilvr demo` asks of a model. Gradio is not needed here."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.data import prompt_of
from ilvr.data.conversations import last_boxed
from ilvr.data.images import image_size, open_image
from ilvr.evaluation import Questions, draw_answers
from ilvr.evaluation.interventions import replace_span, replacements
from ilvr.evaluation.pictures import first_image
from ilvr.evaluation.streaming import Trace, stream_answer

from .demo_html import CONCLUSION, alert, as_image, row, shown, table, trace_html


MAX_MEGABYTES, MAX_MEGAPIXELS, MAX_CHARACTERS = 10, 16, 4000  # of an upload; of a question
MIRRORED = "of the same question about the mirrored image"


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
        groups = [task.group(sample) if task else "" for sample in samples]
        return [(f"{i + 1}: {group}" if group else str(i + 1), i) for i, group in enumerate(groups)]

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
                if trace.answer is None:
                    yield trace_html(trace), None, ""
                else:
                    yield trace_html(trace, self._mark(trace, example)), Asked(sample, trace, example), ""
        except ValueError as error:
            yield alert(error), None, ""

    def _mark(self, trace: Trace, example: int | None) -> str:
        """Whether the answer to an example is right."""
        if example is None or self.questions is None:
            return ""
        if self.questions.is_right([trace.text], [self.questions.references[example]])[0]:
            return "This answer is right."
        return f"This answer is wrong; right is {self.questions.samples[example]['answer']}."

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
            head = f"<h2>Span {number}</h2>{self._picture(asked, number)}"
            yield f"{head}{alert('Answering again …')}"
            if asked.donor is None:
                asked.donor, asked.donor_name = self._donor(asked)
            donor_label, donor = self._donor_span(asked, number)
            rows = [row(f"its own span {number}: the original answer", asked.trace, asked.trace, 0)]
            for label, latents in replacements(own[number - 1], donor, donor_label):
                yield head + table(number, rows) + alert(f"Answering again, with {label} …")
                change = {} if latents is None else {"latent_intervention": replace_span(number - 1, latents)}
                *_, trace = stream_answer(self.model, self.processor, asked.sample, **self.settings, **change)
                rows.append(row(label, trace, asked.trace, number if change else 0))
            yield head + table(number, rows) + (alert(donor_label) if donor is None else "") + CONCLUSION
        except ValueError as error:
            yield alert(error)

    def _picture(self, asked: Asked, number: int) -> str:
        answer, task = asked.trace.answer, self.questions.task if self.questions else None
        assert answer is not None and answer.latents is not None
        meant = task.draw(asked.sample, answer.text)[number - 1 : number] if task and asked.example is not None else []
        note = "Right: the picture that the task means by this span, which the model does not see." if meant else ""
        meant = meant or [(f"span {number}", first_image(asked.sample))]
        span = answer.latents[number - 1 : number]
        draw_answers(
            self.model,
            self.processor,
            [(asked.sample, answer.text, span)],
            file := io.BytesIO(),
            draw=lambda sample, answer: meant,
        )
        picture = as_image(file.getvalue(), f"Cells that the latents of span {number} resemble")
        return f'{picture}<p class="soft">{note}</p>'

    def _donor(self, asked: Asked) -> tuple[Trace, str]:
        """The next example that has another right answer or, if there is none, the question on the mirrored image."""
        other = None
        if asked.example is not None and self.questions is not None:
            right, count = self.questions.references, len(self.questions)
            following = ((asked.example + step) % count for step in range(1, count))
            other = next((i for i in following if right[i] != right[asked.example]), None)
        if other is None or self.questions is None:
            first, *others = asked.sample["images"]
            sample = {**asked.sample, "images": [ImageOps.mirror(open_image(first, "The image")), *others]}
            name = MIRRORED
        else:
            sample, name = self.questions.dataset[other], f"of example {other + 1}"
        *_, trace = stream_answer(self.model, self.processor, sample, **self.settings)
        return trace, name

    def _donor_span(self, asked: Asked, number: int) -> tuple[str, torch.Tensor | None]:
        """What the donor's span is called, and its latents: of the same number, or the last for the last."""
        own, donor = asked.trace.answer, asked.donor and asked.donor.answer
        assert own is not None and own.latents is not None and donor is not None and donor.latents is not None
        if not len(donor.latents):
            return f"The answer {asked.donor_name} has no span to swap in.", None
        given = len(donor.latents) if number == len(own.latents) else min(number, len(donor.latents))
        box = last_boxed(donor.text)
        says = "" if box is None else f", whose answer is {box}"
        return f"span {given} {asked.donor_name}{says}", donor.latents[given - 1]


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
