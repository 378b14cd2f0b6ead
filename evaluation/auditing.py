"""The audit: does a model use its latents, and what do they hold?

M spans, N image tokens, K latents a span, D hidden.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.trainer.target_selection import TargetSelector

from .audit_page import picture_of, write_page
from .audit_results import Audit, ControlResult, DonorFollowing, LatentContent, ModelAudit
from .controls import CONTROLS, DonorRun, check_controls, follow_donors, run_controls
from .helper_features import followed_targets, helper_features, own_selector, selected_targets
from .probes import Rate, linear_probe, mean_norm, nearest_patches
from .questions import Questions
from .records import OWN, Evaluator, Run
from .statistics import holm, mcnemar, paired_difference
from .verdict import judge


def compare(questions: Questions, runs: Mapping[str, Run]) -> dict[str, ControlResult]:
    """Each control beside the own answers.

    Args:
        questions ([`Questions`]).
        runs (`dict[str, Run]`): of [`run_controls`].
    """
    own = runs[OWN]
    parsed = [record.parsed for record in own.records]
    names = [name for name in runs if name != OWN]
    p_values = {name: mcnemar(own.right, runs[name].right) for name in names}
    adjusted = holm(p_values)
    return {
        name: ControlResult(
            Rate.of(sum(runs[name].right), len(questions)),
            sum(a != record.parsed for a, record in zip(parsed, runs[name].records)) / len(questions),
            runs[name].spans_per_sample,
            runs[name].without_span,
            paired_difference(own.right, runs[name].right),
            p_values[name],
            adjusted[name],
        )
        for name in names
    }


def measure_content(
    latents: Sequence[torch.Tensor],
    pictures: Sequence[Sequence[torch.Tensor]],
    targets: Sequence[torch.Tensor] | None = None,
    patches: Sequence[Sequence[Sequence[int]]] | None = None,
) -> LatentContent:
    """What latents hold.

    Args:
        latents (`Sequence[torch.Tensor]`): of each sample, (spans, K, D).
        pictures (`Sequence[Sequence[torch.Tensor]]`): features (N, D) of its helper images.
        targets (`Sequence[torch.Tensor]`, *optional*): what its latents should hold, (S, K, D).
        patches (`Sequence[Sequence[Sequence[int]]]`, *optional*): for each helper image the K patches that they should
            hold, -1 for none; the probe reads the first.
    """
    seen = targets if targets is not None else [picture for own in pictures for picture in own]
    norms = mean_norm(latents), mean_norm(seen)
    spans = [] if patches is None else _known_spans(latents, pictures, patches)
    if not spans:
        return LatentContent(*norms)
    hits_of: dict[int, list[bool]] = {}
    found: list[list[bool]] = []
    for span in spans:
        nearest = nearest_patches(span.latents, span.picture).tolist()
        found.append([one == patch for one, patch in zip(nearest, span.patches) if patch >= 0])
    for span, hits in zip(spans, found):
        hits_of.setdefault(span.number, []).extend(hits)
    samples = torch.tensor([span.sample for span in spans])
    vectors = torch.stack([span.latents for span in spans]).flatten(1)  # (M, K * D)
    labels = torch.tensor([span.patches[0] for span in spans])
    features = torch.stack([span.picture[span.patches[0]] for span in spans])  # (M, D)
    several = len(samples.unique()) > 1
    return LatentContent(
        *norms,
        retrieval_at_1=_rate([hit for hits in found for hit in hits]),
        retrieval_by_span=[_rate(hits_of[number]) for number in sorted(hits_of)],
        patches=sum(len(span.picture) for span in spans) / len(spans),
        probe=linear_probe(vectors, labels, samples) if several else None,
        ceiling=linear_probe(features, labels, samples) if several else None,
    )


class _Span(NamedTuple):
    sample: int
    number: int
    latents: torch.Tensor  # (K, D)
    picture: torch.Tensor  # (N, D)
    patches: Sequence[int]  # K


def _known_spans(
    latents: Sequence[torch.Tensor],
    pictures: Sequence[Sequence[torch.Tensor]],
    patches: Sequence[Sequence[Sequence[int]]],
) -> list[_Span]:
    """The generated spans that have a helper image of their number."""
    rows = enumerate(zip(latents, pictures, patches))
    return [_Span(sample, number, *span) for sample, row in rows for number, span in enumerate(zip(*row))]


def _rate(hits: Sequence[bool]) -> Rate:
    return Rate.of(sum(hits), len(hits))


# --------------------------------------------------------------------------------------------------------------- runs


def audit_model(
    evaluator: Evaluator,
    name: str,
    controls: Sequence[str] | None = None,
    *,
    selector: TargetSelector | None = None,
    seed: int = 0,
) -> ModelAudit:
    """Audits one model.

    Args:
        evaluator ([`Evaluator`]): of the model and the questions.
        name (`str`): of the model.
        controls (`Sequence[str]`, *optional*): names among `CONTROLS`; all that the questions allow by default. The
            oracle needs helper images, and a task that names the followed patches, or a selector.
        selector (`TargetSelector`, *optional*): says what the latents should hold, in place of the task; see
            [`~ilvr.evaluation.helper_features.own_selector`].
        seed (`int`, *optional*, defaults to 0): of noise.

    Raises:
        ValueError: for an unknown control, for `controls` without `another_sample`, and for `oracle` where nothing
            says what latents should hold.
    """
    asked = [*CONTROLS] if controls is None else list(controls)
    check_controls(asked)
    model, processor, questions = evaluator.model, evaluator.processor, evaluator.questions
    pictures = helper_features(model, processor, questions.dataset)
    targets, patches = _expected(evaluator, pictures, selector)
    if targets is None and controls is None:
        asked.remove("oracle")
    runs = run_controls(evaluator, asked, targets=targets, seed=seed)
    donors = follow_donors(evaluator, runs[OWN])
    return summarize(
        questions, name, runs, donors, measure_content(runs[OWN].latents or [], pictures, targets, patches)
    )


def _expected(
    evaluator: Evaluator, pictures: list[list[torch.Tensor]], selector: TargetSelector | None
) -> tuple[list[torch.Tensor] | None, list[list[list[int]]] | None]:
    """What latents should hold, for each sample (S, K, D), and the patches (S, K) that it is the feature of."""
    questions, processor, task = evaluator.questions, evaluator.processor, evaluator.questions.task
    if not any(pictures):
        return None, None
    if selector is not None:
        embeddings: Any = evaluator.model.get_input_embeddings()
        pad = embeddings.weight[processor.latent_token_ids[1]].detach()
        return selected_targets(selector, processor, questions.dataset, pad)
    patches = [None if task is None else task.followed_patches(sample) for sample in questions.samples]
    if task is None or any(own is None for own in patches):
        return None, None
    size = processor.latent_size
    targets = followed_targets(task, questions.samples, pictures, size)
    return targets, [[[patch] * size for patch in own or []] for own in patches]


def summarize(
    questions: Questions,
    name: str,
    runs: Mapping[str, Run],
    donors: DonorRun | None = None,
    content: LatentContent | None = None,
) -> ModelAudit:
    """The audit of runs that are there.

    Args:
        questions ([`Questions`]).
        name (`str`): of the model.
        runs (`dict[str, Run]`): of [`run_controls`].
        donors ([`DonorRun`], *optional*): of [`follow_donors`].
        content (`LatentContent`, *optional*): of [`measure_content`].
    """
    own = runs[OWN]
    results = compare(questions, runs)
    accuracy = Rate.of(sum(own.right), len(questions))
    following = None if donors is None else DonorFollowing.of(donors)
    return ModelAudit(
        name,
        accuracy,
        own.spans_per_sample,
        own.without_span,
        results,
        content or LatentContent(mean_norm(own.latents or [])),
        following,
        judge(accuracy, own.without_span, results, following),
    )


def audit(
    models: Sequence[str | Path],
    questions: Questions,
    *,
    output: str | Path,
    controls: Sequence[str] | None = None,
    selection: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    pictured: int = 3,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    **generate_kwargs: Any,
) -> Audit:
    """Audits checkpoints on the same questions; writes `audit.json` and `audit.html`, and goes on where it was killed.

    Args:
        models (`Sequence[str]`): folders or Hub ids of ILVR checkpoints.
        questions ([`Questions`]).
        output (`str` or `Path`): a folder; records of each run go into `answers/` in it.
        controls (`Sequence[str]`, *optional*): see [`audit_model`].
        selection (`dict`, *optional*): [`~ilvr.trainer.ILVRTrainingConfig`] settings, such as `selection_method`, by
            which each model selects what its latents should hold, in place of what the task knows.
        batch_size (`int`, *optional*, defaults to 64): questions answered at once.
        pictured (`int`, *optional*, defaults to 3): samples that are pictured for each model.
        model_kwargs (`dict`, *optional*): of `from_pretrained`.
        seed (`int`, *optional*, defaults to 0): of noise.
        generate_kwargs: passed to `generate`; greedy decoding by default.

    Returns:
        [`Audit`].

    Raises:
        ValueError: for a model that is no ILVR checkpoint, and as [`audit_model`].

    Example:

    ```python
    >>> from ilvr.evaluation import Questions, audit
    >>> from ilvr.tasks import load_task

    >>> task = load_task("shifts", boards=1, test_boards=500)
    >>> found = audit(["runs/shifts_small/stage2"], Questions.of_task(task), output="runs/audit")
    >>> print(found.models[0].verdict)
    ```
    """
    folder = Path(output)
    if selection and questions.task is not None:
        selection = {"helper_question": questions.task.helper_question, **selection}
    settings = {"batch_size": batch_size, "seed": seed, "selection": selection, "generate": generate_kwargs}
    found = Audit(questions.name, questions.metric_name, len(questions), settings=settings)
    pictures: list[str | None] = []
    for number, path in enumerate(models):
        model, processor = load_checkpoint(path, **(model_kwargs or {}))
        answers = folder / "answers" / f"{number}-{Path(path).name}"
        evaluator = Evaluator(model, processor, questions, folder=answers, batch_size=batch_size, **generate_kwargs)
        selector = own_selector(model, **selection) if selection else None
        found.models.append(audit_model(evaluator, str(path), controls, selector=selector, seed=seed))
        pictures.append(picture_of(evaluator, pictured) if pictured else None)
    (folder / "audit.json").write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    write_page(found, pictures, folder / "audit.html")
    return found


def load_checkpoint(path: str | Path, **kwargs: Any) -> tuple[ILVRForConditionalGeneration, ILVRProcessor]:
    """An ILVR checkpoint and its processor, on a GPU where there is one; an adapter is merged into its backbone.

    Args:
        path (`str` or `Path`): folder or Hub id.
        kwargs: passed to `from_pretrained` of the model.
    """
    model: Any = ILVRForConditionalGeneration.from_pretrained(path, **kwargs)  # first: it knows a plain backbone
    processor = ILVRProcessor.from_pretrained(path)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    if "device_map" not in kwargs and torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model, processor
