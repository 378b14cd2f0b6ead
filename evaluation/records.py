"""Answers to questions, one record a sample, written as they come: a run that was killed goes on where it stopped.

A file of records starts with a line that says what it holds: model, questions, settings. Another run does not mix with
it. Batches are the same wherever a run was cut, for the numbers of a padded batch are not those of its rows alone.

K latents a span, D hidden.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.trainer.inputs.image_features import weights_key

from .generation import GREEDY, Answer, answer_batch
from .questions import Questions


logger = logging.getLogger(__name__)
OWN = "own"


@dataclass(frozen=True)
class Record:
    """One answered question.

    Args:
        index (`int`): of the sample among the questions.
        answer (`str`): the generated words.
        parsed (`str`, *optional*): what the metric reads in them; `None` for nothing.
        reference (`Any`): what is right.
        right (`bool`): whether the answer is.
        spans (`int`), tokens (`int`), finished (`bool`): see [`Answer`].
        seconds (`float`): the batch's time, divided by its samples.
    """

    index: int
    answer: str
    parsed: str | None
    reference: Any
    right: bool
    spans: int
    tokens: int
    finished: bool
    seconds: float


@dataclass
class Run:
    """The records of a run over all questions, and its latents, for each sample (spans, K, D), if they were kept."""

    name: str
    records: list[Record]
    latents: list[torch.Tensor] | None = None

    @property
    def right(self) -> list[bool]:
        return [record.right for record in self.records]

    @property
    def answers(self) -> list[str]:
        return [record.answer for record in self.records]

    @property
    def spans_per_sample(self) -> float:
        return sum(record.spans for record in self.records) / len(self.records)

    @property
    def without_span(self) -> float:
        """The share of samples whose answer has no latent span."""
        return sum(record.spans == 0 for record in self.records) / len(self.records)


class Evaluator:
    """Asks one model a set of questions, as it is or under controls.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        questions ([`Questions`]).
        folder (`str` or `Path`, *optional*): where each run writes its records, `own.jsonl` and so on, and finds those
            that an earlier one has left; none are written by default.
        batch_size (`int`, *optional*, defaults to 64): questions answered at once.
        generate_kwargs: settings of `generate` that a JSON file can hold; greedy decoding by default.

    Raises:
        ValueError: for another kind of setting, such as a function.

    Example:

    ```python
    >>> evaluator = Evaluator(model, processor, Questions.of_task(task), folder="runs/answers", max_new_tokens=128)
    >>> run = evaluator.run()
    >>> sum(run.right) / len(run.right)
    ```
    """

    def __init__(
        self,
        model: ILVRForConditionalGeneration,
        processor: ILVRProcessor,
        questions: Questions,
        *,
        folder: str | Path | None = None,
        batch_size: int = 64,
        **generate_kwargs: Any,
    ) -> None:
        self.model, self.processor, self.questions = model, processor, questions
        self.folder = None if folder is None else Path(folder)
        self.batch_size, self.generate_kwargs = batch_size, {**GREEDY, **generate_kwargs}
        try:
            json.dumps(self.generate_kwargs)
        except TypeError as error:
            raise ValueError(
                f"The settings of `generate` are written beside the answers, and {error}. What a function does to "
                "latents or attention is a control."
            ) from error
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")

    @cached_property
    def header(self) -> dict[str, Any]:
        """What the records follow from, beside the control."""
        return {
            "model": weights_key([self.model]),
            "questions": self.questions.fingerprint,
            "metric": self.questions.metric_name,
            "batch_size": self.batch_size,
            "dtype": str(self.model.dtype),
            "generate": self.generate_kwargs,
        }

    def run(
        self,
        name: str = OWN,
        options: Callable[[range], dict[str, Any]] | None = None,
        *,
        keep_latents: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> Run:
        """Answers all questions.

        Args:
            name (`str`, *optional*, defaults to `"own"`): of the run and its file.
            options (`Callable`, *optional*): further arguments of `generate` for the samples of a batch, given by
                their range, such as a `latent_intervention`.
            keep_latents (`bool`, *optional*, defaults to `False`): whether the run has its latents.
            settings (`dict`, *optional*): what `options` follows from, such as a seed, for the first line of the file.

        Returns:
            [`Run`].

        Raises:
            ValueError: if there is a file of this name by another run.
        """
        file = None
        if self.folder is not None:
            file = RecordFile(self.folder / f"{name}.jsonl", {**self.header, "control": name, **(settings or {})})
        batches = list(self._batches())
        records = [] if file is None else file.resume(batches, with_latents=keep_latents)
        latents = file.latents(batches, len(records)) if file is not None and keep_latents else []
        bar = tqdm(total=len(self.questions), initial=len(records), desc=f"Answering, {name}", unit="sample")
        with bar:
            for batch in batches:
                if batch.stop <= len(records):
                    continue
                found, own = self._answer(batch, keep_latents, {} if options is None else options(batch))
                if file is not None:
                    file.append(found, own if keep_latents else None)
                records += found
                latents += own
                bar.update(len(batch))
        return Run(name, records, latents if keep_latents else None)

    def _batches(self) -> Iterator[range]:
        for start in range(0, len(self.questions), self.batch_size):
            yield range(start, min(start + self.batch_size, len(self.questions)))

    def _answer(
        self, batch: range, keep_latents: bool, options: dict[str, Any]
    ) -> tuple[list[Record], list[torch.Tensor]]:
        start = time.perf_counter()
        samples = [self.questions.dataset[i] for i in batch]
        settings = {**self.generate_kwargs, **options, "output_latents": keep_latents}
        answers = answer_batch(self.model, self.processor, samples, **settings)
        seconds = round((time.perf_counter() - start) / len(batch), 4)
        records = [self._record(i, answer, seconds) for i, answer in zip(batch, answers)]
        # A copy, for what inference mode has made takes no part in the training of a probe.
        return records, [answer.latents.cpu().clone() for answer in answers if answer.latents is not None]

    def _record(self, index: int, answer: Answer, seconds: float) -> Record:
        reference = self.questions.references[index]
        (right,) = self.questions.is_right([answer.text], [reference])
        parsed = self.questions.parse(answer.text)
        return Record(
            *(index, answer.text, parsed, reference, right, answer.spans, answer.tokens, answer.finished, seconds)
        )


class RecordFile:
    """A JSONL file of records, and a folder beside it of their latents, one file a batch.

    Args:
        path (`Path`): of the file.
        header (`dict`): what the records follow from; the first line.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, json.loads(json.dumps(header))

    def resume(self, batches: list[range], *, with_latents: bool) -> list[Record]:
        """The records of the whole batches that are there; what is left of a batch that was cut off is dropped.

        Raises:
            ValueError: if the file is of another run.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # a kill can leave half a line
        if not whole:
            self.path.write_text(json.dumps(self.header) + "\n", encoding="utf-8")
            return []
        self._check(whole[0])
        count = 0
        for batch in batches:
            has_latents = not with_latents or self._latents_path(batch).exists()
            if batch.stop > len(whole) - 1 or not has_latents:
                break
            count = batch.stop
        with open(self.path, "r+b") as file:
            file.truncate(sum(map(len, whole[: 1 + count])))
        records = [Record(**json.loads(line)) for line in whole[1 : 1 + count]]
        if records:
            logger.info(f"{self.path} has {count} of {batches[-1].stop} answers already.")
        return records

    def append(self, records: list[Record], latents: list[torch.Tensor] | None) -> None:
        """Writes the records of a batch, after their latents."""
        batch = range(records[0].index, records[-1].index + 1)
        if latents is not None:
            path = self._latents_path(batch)
            path.parent.mkdir(exist_ok=True)
            save_file({str(i): own.contiguous() for i, own in zip(batch, latents)}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        text = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
        with open(self.path, "ab") as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))

    def latents(self, batches: list[range], count: int) -> list[torch.Tensor]:
        """The latents (spans, K, D) of the first `count` samples."""
        kept = [load_file(self._latents_path(batch)) for batch in batches if batch.stop <= count]
        return [batch[name] for batch in kept for name in sorted(batch, key=int)]

    def _latents_path(self, batch: range) -> Path:
        return self.path.with_suffix(".latents") / f"{batch.start}.safetensors"

    def _check(self, line: bytes) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or "control" not in found:
            raise ValueError(f"{self.path} is no file of records. Choose another folder, or move it away.")
        for name in self.header | found:
            if found.get(name) != self.header.get(name):
                raise ValueError(
                    f"{self.path} holds answers of another run: its {name} is {found.get(name)!r:.120}, that of this "
                    f"run {self.header.get(name)!r:.120}. Choose another folder, or remove the file."
                )
