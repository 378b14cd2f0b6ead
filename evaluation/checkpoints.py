"""What a run reports of its checkpoints: scores, a table, model cards, pictures, and a reload in a fresh process."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.data import prompt_of
from ilvr.data.conversations import image_roles
from ilvr.hub_cards import ILVRModelCard, Result
from ilvr.tasks import Task

from .audit_results import ModelAudit
from .auditing import summarize
from .controls import LABELS, REPORTED, follow_donors, run_controls
from .generation import GREEDY, generate_answers
from .metrics import load_metric, score_each, scores_by_group
from .pictures import draw_curves, draw_latents
from .probes import Rate
from .questions import Questions
from .records import OWN, Evaluator


FOLLOWED = "the last span's donor followed"
FRESH_PROCESS = Path(__file__).parent / "fresh_process.py"
PICTURED = 4  # samples in the picture of latents, at most


def evaluate_checkpoints(
    task: Task,
    cards: dict[str, ILVRModelCard | None],
    folder: str | Path,
    *,
    forms: dict[str, str],
    load: Callable[[str], ILVRForConditionalGeneration] | None = None,
    reload: bool = False,
    batch_size: int = 64,
    controls: int = 64,
    **generate_kwargs: Any,
) -> dict[str, dict[str, float]]:
    """Scores checkpoints on the same test questions; writes results, their table, cards, curves and a picture.

    Those that are asked for a trace answer some questions under controls of their latents, too.

    Args:
        task ([`~ilvr.tasks.Task`]): asks and scores.
        cards (`dict[str, ILVRModelCard]`): by name of a checkpoint, which is the folder that it lies in; the last is
            pictured and reloaded. None for a model that others made: it is scored, and no card is written.
        folder (`str` or `Path`): holds the checkpoints; the report is written here.
        forms (`dict[str, str]`): by name, the form of the questions: `trace` or `answer`.
        load (`Callable`, *optional*): the model of a name, where it is more than what its folder holds.
        reload (`bool`, *optional*, defaults to `False`): whether a fresh process, on the CPU and without `ilvr`,
            has to give the same answers.
        batch_size (`int`, *optional*, defaults to 64): questions answered at once.
        controls (`int`, *optional*, defaults to 64): questions asked under each of the controls `REPORTED`; 0: none.
        generate_kwargs: passed to `generate`.

    Returns:
        `dict`: what the metric found, by checkpoint; with `controls`, `controls.json` holds what came of them.

    Raises:
        RuntimeError: if the reloaded model answers otherwise.
    """
    folder, metric = Path(folder), load_metric(task.metric)

    def score(samples: Iterable[dict[str, Any]], answers: list[str]) -> dict[str, float]:
        found = metric.compute(predictions=answers, references=[task.reference(sample) for sample in samples])
        return found or {}

    processor = ILVRProcessor.from_pretrained(folder / next(reversed(cards)))
    tests = {form: task.dataset("test", form) for form in sorted({forms[name] for name in cards})}
    results, audits = {}, {}
    for name, card in cards.items():
        model = (load or partial(_load, folder))(name).to(PartialState().device)
        test = tests[forms[name]]
        options = {"batch_size": batch_size, "desc": f"Testing {name}", **generate_kwargs}
        answers = generate_answers(model, processor, test, **options)
        results[name] = score(test.remove_columns("images"), answers)
        if controls and forms[name] == "trace":
            questions = Questions.of_task(task, samples=controls)
            evaluator = Evaluator(model, processor, questions, batch_size=batch_size, **generate_kwargs)
            audits[name] = _audit(evaluator, name)
        if card is not None:
            _fill(card, task, results[name], audits.get(name)).save(folder / name)
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    if audits:
        found = {name: audit.to_dict() for name, audit in audits.items()}
        (folder / "controls.json").write_text(json.dumps(found, indent=2))
    table = score_table(results, audits)
    (folder / "results.md").write_text(table)
    print(f"\n{table}")

    made = [name for name, card in cards.items() if card is not None]
    draw_curves({name: folder / name / "trainer_state.json" for name in made}, folder / "curves.png")
    few = test.select(_first_of_each(task, test, 2)[:PICTURED])
    if all("user" in image_roles(messages) for messages in few["messages"]):
        draw_latents(
            *(model, processor, few, folder / "latents.png"),
            draw=task.draw,
            is_right=lambda sample, answer: score_each(metric, [answer], [task.reference(sample)])[0],
            **generate_kwargs,
        )
        print(f"Latents of {name} drawn to {folder / 'latents.png'}")
    if reload:
        some = test.select(_first_of_each(task, test, 16))
        answers = generate_answers(model, processor, some, batch_size=len(some), desc="Here", **generate_kwargs)
        _check_reload(folder, name, some, answers, {**GREEDY, **generate_kwargs}["max_new_tokens"])
    _offer_a_question(folder, name, few[0])
    return results


def _offer_a_question(folder: Path, name: str, sample: dict[str, Any]) -> None:
    """Prints the command that asks a question of one picture, which is saved as a file of its own."""
    parts = [part for turn in prompt_of(sample) for part in turn["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if len(images) == len(texts) == 1:  # what the command takes
        images[0].save(folder / "question.png")
        command = ["ilvr", "generate", str(folder / name), str(folder / "question.png"), texts[0]]
        print(f"One of the questions, to ask it yourself:\n{shlex.join(command)}")


def _load(folder: Path, name: str) -> ILVRForConditionalGeneration:
    return ILVRForConditionalGeneration.from_pretrained(folder / name)


def score_table(results: dict[str, dict[str, float]], audits: Mapping[str, ModelAudit] | None = None) -> str:
    """A Markdown table with a row for each model.

    Args:
        results (`dict`): what the metric found, by model; a column for each group of samples, or one for all.
        audits (`dict[str, ModelAudit]`, *optional*): by model, accuracy under controls; a column for each.
    """
    scores = {name: scores_by_group(result) for name, result in results.items()}
    groups = [group for group in next(iter(scores.values())) if group] or [""]
    has_invalid = all("invalid" in result for result in results.values())
    headings = ["model", *(group or next(iter(next(iter(results.values())))) for group in groups)]
    headings += ["invalid"] if has_invalid else []
    controlled = {name: dict(_controlled(audit)) for name, audit in (audits or {}).items()}
    columns = list(next(iter(controlled.values()), {}))
    lines = [headings + columns, ["---"] * len(headings + columns)]
    for name, found in scores.items():
        own = [str(found[group]) for group in groups]
        own += [f"{100 * results[name]['invalid']:.1f} %"] if has_invalid else []
        lines.append([name, *own, *(str(controlled.get(name, {}).get(column, "")) for column in columns)])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    for audit in (audits or {}).values():
        table += (
            f"\n{audit.model}, {audit.accuracy.count} questions under controls: {' '.join(audit.verdict.reasons)}\n"
        )
    return table


def _controlled(audit: ModelAudit) -> list[tuple[str, Rate]]:
    """Labels and rates of a model's own answers, of the controls, and of donors that are followed."""
    rows = [(LABELS[OWN], audit.accuracy)]
    rows += [(LABELS[name], result.accuracy) for name, result in audit.controls.items()]
    return rows + ([] if audit.donor_following is None else [(FOLLOWED, audit.donor_following.follows)])


def _audit(evaluator: Evaluator, name: str) -> ModelAudit:
    runs = run_controls(evaluator, REPORTED)
    return summarize(evaluator.questions, name, runs, follow_donors(evaluator, runs[OWN]))


def _fill(card: ILVRModelCard, task: Task, result: dict[str, float], audit: ModelAudit | None) -> ILVRModelCard:
    """Writes the results into a card, one for each group of samples, and those under controls."""
    scores = scores_by_group(result)
    card.results = [
        Result(
            *(f"{task.title} {group}".strip(), score.name, score.value, score.count, score.low, score.high),
            dataset=task.title,
            dataset_config=group or None,
            dataset_split="test",
        )
        for group, score in scores.items()
        if group or len(scores) == 1
    ]
    if audit is not None:
        metric = scores[""].name
        card.controls = [
            Result(label, metric, rate.value, rate.count, rate.low, rate.high) for label, rate in _controlled(audit)
        ]
    card.example_prompt = task.prompt
    return card


def _first_of_each(task: Task, dataset: Dataset, number: int) -> list[int]:
    """Indices of the first few samples of each group."""
    found: dict[str, list[int]] = {}
    for index, sample in enumerate(dataset.remove_columns("images")):
        own = found.setdefault(task.group(sample), [])
        if len(own) < number:
            own.append(index)
    return sorted(index for own in found.values() for index in own)


def _check_reload(folder: Path, name: str, dataset: Dataset, expected: list[str], max_new_tokens: int) -> None:
    """Answers of a fresh process, which loads the folder with `trust_remote_code=True`, equal those of this one."""
    dataset.save_to_disk(folder / "reload_check")
    output = folder / "reload_check.json"
    arguments = [folder / name, folder / "reload_check", output, max_new_tokens]
    subprocess.run([sys.executable, str(FRESH_PROCESS), *map(str, arguments)], check=True)
    reloaded = json.loads(output.read_text())
    if reloaded != expected:
        different = sum(a != b for a, b in zip(reloaded, expected))
        raise RuntimeError(f"{different} of {len(expected)} answers of the reloaded model differ: see {output}.")
    print(f"Reloaded in a fresh process with trust_remote_code=True: the same {len(expected)} answers.")
