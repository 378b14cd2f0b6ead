"""The page of an audit: one HTML file that asks for nothing else."""

import base64
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape

from ilvr.data.conversations import image_roles

from .audit_results import Audit, ModelAudit
from .controls import LABELS
from .pictures import draw_latents
from .probes import Rate
from .records import OWN, Evaluator


WORDS = {
    "used": "Its latents are used.",
    "sensitive": "Its answers depend on the latents without need of them.",
    "idle": "Its latents are idle.",
    "none": "It makes no latents to speak of.",
    "open": "Too few samples to tell.",
}


def write_page(audit: Audit, pictures: Sequence[str | None], path: str | Path) -> None:
    """Writes the page.

    Args:
        audit ([`Audit`]).
        pictures (`Sequence[str]`): of each model, from [`picture_of`]; `None` for none.
        path (`str` or `Path`): of the HTML file.
    """
    environment = Environment(loader=PackageLoader("ilvr.evaluation", ""), autoescape=select_autoescape())
    page = environment.get_template("audit_page.html").render(
        audit=audit,
        facts=audit.to_dict(),
        pairs=list(zip(audit.models, pictures)),
        bars=bars,
        words=WORDS,
        labels=LABELS,
    )
    Path(path).write_text(page, encoding="utf-8")


def bars(model: ModelAudit) -> list[tuple[str, Rate, bool]]:
    """Label, accuracy and whether it falls, of the own answers and of each control."""
    rows = [(LABELS[name], result.accuracy, result.falls) for name, result in model.controls.items()]
    return [(LABELS[OWN], model.accuracy, False), *rows]


def picture_of(evaluator: Evaluator, samples: int) -> str | None:
    """A picture of the latents of some samples, as the text of a PNG's data URL.

    Args:
        evaluator ([`Evaluator`]): asks the model.
        samples (`int`): how many, evenly spread over those whose question has an image.

    Returns:
        `str`, or `None` if no question has an image.
    """
    questions, task = evaluator.questions, evaluator.questions.task
    seen = [i for i, sample in enumerate(questions.samples) if "user" in image_roles(sample["messages"])]
    chosen = sorted({seen[i * len(seen) // samples] for i in range(samples)}) if seen else []
    if not chosen:
        return None
    few = questions.dataset.select(chosen).add_column("number", chosen)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "latents.png"
        draw_latents(
            *(evaluator.model, evaluator.processor, few, path),
            draw=None if task is None else task.draw,
            is_right=lambda sample, answer: questions.is_right([answer], [questions.references[sample["number"]]])[0],
            max_spans=5,
            **evaluator.generate_kwargs,
        )
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
