"""Controls: the same questions and the same greedy decoding, with something else in the place of the model's latents.

What a control puts in is known before its run: latents of the model's own answers (the run `own`), features of helper
images, or nothing. A control is a function from [`ControlInputs`], what is known of a batch, to arguments of
`generate`.

B batch, S spans, K latents a span, D hidden.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ilvr.latent_attention import hide_images_after_first_span
from ilvr.latent_decoding import Intervention
from ilvr.latent_spans import pad_spans

from .records import OWN, Evaluator, Run


@dataclass
class ControlInputs:
    """What controls may put in.

    Args:
        samples (`range`): numbers of the batch's samples among the questions.
        own (`list[torch.Tensor]`): for each sample of all questions, the latents (spans, K, D) of its own answer.
        targets (`list[torch.Tensor]`, *optional*): for each sample what its latents should hold, (S, K, D).
        pad_embedding (`torch.Tensor` of shape `(D,)`): the embedding of `<|latent_pad|>`.
        start_id (`int`): id of `<|latent_start|>`.
        seed (`int`): of noise.
    """

    samples: range
    own: list[torch.Tensor]
    targets: list[torch.Tensor] | None
    pad_embedding: torch.Tensor
    start_id: int
    seed: int = 0


def replace_by(rows: Sequence[torch.Tensor], *, beyond: str = "last") -> Intervention:
    """Puts given latents in, span by span.

    Args:
        rows (`Sequence[torch.Tensor]`): for each row of the batch the latents (spans, K, D) that it gets; a row
            without spans keeps its own latents.
        beyond (`str`, *optional*, defaults to `"last"`): what a span gets that has no counterpart: `last`, the last
            one that there is, or `own`, what the model feeds back.

    Returns:
        `Callable`: an intervention for `generate`.
    """
    values, _ = pad_spans(list(rows))  # (B, S, K, D)
    counts = torch.tensor([len(row) for row in rows])

    def intervene(latents: torch.Tensor, span: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if len(latents) != len(counts):
            raise ValueError(
                f"A control has latents for {len(counts)} rows, got {len(latents)}. Decode with one beam."
            )
        span, index = span.cpu(), index.cpu().clamp(min=0)
        limit = counts if beyond == "own" else counts.sign() * torch.iinfo(torch.long).max
        has_one = ((span >= 0) & (span < limit)).to(latents.device)
        if not has_one.any():
            return latents
        number = torch.minimum(span, counts - 1).clamp(min=0)
        given = values[torch.arange(len(counts)), number, index].to(latents)  # (B, D)
        return torch.where(has_one.unsqueeze(1), given, latents)

    return intervene


# ------------------------------------------------------------------------------------------------- one function each


def another_sample(inputs: ControlInputs) -> dict[str, Any]:
    """The latents of the sample before, of those that have any; the first one takes those of the last."""
    donors = [_donor_before(inputs.own, sample) for sample in inputs.samples]
    return {"latent_intervention": replace_by([inputs.own[i] if d is None else inputs.own[d] for i, d in donors])}


def _donor_before(own: Sequence[torch.Tensor], sample: int) -> tuple[int, int | None]:
    others = ((sample - step) % len(own) for step in range(1, len(own)))
    return sample, next((other for other in others if len(own[other])), None)


def position_mean(inputs: ControlInputs) -> dict[str, Any]:
    """The mean latent of the same span and place over all samples that have it."""
    values, mask = pad_spans(inputs.own)  # (samples, S, K, D), (samples, S, K)
    means = values.float().sum(0) / mask.sum(0).clamp(min=1).unsqueeze(-1)  # (S, K, D)
    return {"latent_intervention": replace_by([means] * len(inputs.samples))}


def first_latent(inputs: ControlInputs) -> dict[str, Any]:
    """The sample's own first latent, in all places of all its spans."""
    own = (inputs.own[i] for i in inputs.samples)
    rows = [latents[:1, :1].expand(-1, latents.shape[1], -1) for latents in own]
    return {"latent_intervention": replace_by(rows)}


def noise(inputs: ControlInputs, share: float) -> dict[str, Any]:
    """Each latent blended with normal noise of its norm, and brought back to its norm; a share of 1 is noise alone."""
    generator = torch.Generator().manual_seed(inputs.seed * 1_000_003 + inputs.samples.start)

    def intervene(latents: torch.Tensor, span: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(latents.shape, generator=generator).to(latents)
        norm = latents.norm(dim=-1, keepdim=True)
        drawn = drawn * norm / drawn.norm(dim=-1, keepdim=True)
        blend = (1 - share) * latents + share * drawn
        return blend * norm / blend.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    return {"latent_intervention": intervene}


def zeros(inputs: ControlInputs) -> dict[str, Any]:
    """Zeros, which no model has ever been fed: see `noise` and `position_mean` before a fall is read as use."""
    return {"latent_intervention": lambda latents, span, index: torch.zeros_like(latents)}


def oracle(inputs: ControlInputs) -> dict[str, Any]:
    """What the latents should hold, from the helper images; further spans have the model's own."""
    assert inputs.targets is not None
    return {"latent_intervention": replace_by([inputs.targets[i] for i in inputs.samples], beyond="own")}


def markers_only(inputs: ControlInputs) -> dict[str, Any]:
    """The embedding of `<|latent_pad|>` in each place: the span's tokens without anything fed back."""
    return {"latent_intervention": lambda latents, span, index: inputs.pad_embedding.expand_as(latents)}


def no_spans(inputs: ControlInputs) -> dict[str, Any]:
    """No `<|latent_start|>`: the answer in words alone."""
    return {"suppress_tokens": [inputs.start_id]}


def hidden_image(inputs: ControlInputs) -> dict[str, Any]:
    """What comes after the first span does not see the question's images, only the latents; see `latent_attention`."""
    return {"attention_rule": hide_images_after_first_span}


CONTROLS: dict[str, Callable[[ControlInputs], dict[str, Any]]] = {
    "another_sample": another_sample,
    "position_mean": position_mean,
    "first_latent": first_latent,
    "noise_0.1": partial(noise, share=0.1),
    "noise_0.3": partial(noise, share=0.3),
    "noise_1.0": partial(noise, share=1.0),
    "zeros": zeros,
    "oracle": oracle,
    "markers_only": markers_only,
    "no_spans": no_spans,
    "hidden_image": hidden_image,
}
LABELS = {
    OWN: "own latents",
    "another_sample": "another sample's",
    "position_mean": "mean latent",
    "first_latent": "first latent repeated",
    "noise_0.1": "own, a tenth noise",
    "noise_0.3": "own, three tenths noise",
    "noise_1.0": "noise of their norm",
    "zeros": "zeros",
    "oracle": "what they should hold",
    "markers_only": "pads, nothing fed back",
    "no_spans": "no spans",
    "hidden_image": "own, image hidden behind the first span",
}
SMALL = ("another_sample", "zeros")  # what an evaluation runs unasked
REPORTED = ("another_sample", "position_mean", "noise_1.0", "zeros")  # what a training run reports


# ------------------------------------------------------------------------------------------------------------ running


def run_controls(
    evaluator: Evaluator,
    controls: Sequence[str] = tuple(CONTROLS),
    *,
    targets: list[torch.Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Run]:
    """Answers the questions with the model's own latents, and under each control.

    Args:
        evaluator ([`Evaluator`]).
        controls (`Sequence[str]`, *optional*, defaults to all of `CONTROLS`): their names.
        targets (`list[torch.Tensor]`, *optional*): what the latents of each sample should hold, for `oracle`; see
            [`followed_targets`] and [`selected_targets`].
        seed (`int`, *optional*, defaults to 0): of noise.

    Returns:
        `dict[str, Run]`: by name, `own` first, which holds the latents.

    Raises:
        ValueError: for an unknown control, and for `oracle` without targets.
    """
    check_controls(controls)
    if "oracle" in controls and targets is None:
        raise ValueError(
            "The control 'oracle' puts in what the latents should hold. Pass targets=, or leave it out of controls."
        )
    own = evaluator.run(OWN, keep_latents=True)
    assert own.latents is not None
    start_id, pad_id, _ = evaluator.processor.latent_token_ids
    embeddings: Any = evaluator.model.get_input_embeddings()
    pad_embedding = embeddings.weight[pad_id].detach()
    runs = {OWN: own}
    for name in controls:

        def options(batch: range, name: str = name) -> dict[str, Any]:
            return CONTROLS[name](ControlInputs(batch, own.latents or [], targets, pad_embedding, start_id, seed))

        # What else than the model, the questions and the name the answers follow from.
        settings: dict[str, Any] = {"seed": seed} if name.startswith("noise") else {}
        if name == "oracle":
            settings = {"targets": _digest(targets)}
        runs[name] = evaluator.run(name, options, settings=settings)
    return runs


def _digest(targets: list[torch.Tensor] | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for own in targets or []:
        digest.update(own.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_controls(controls: Sequence[str]) -> None:
    """Refuses names that are none of `CONTROLS`."""
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown:
        raise ValueError(f"There is no control {unknown[0]!r}; choose among {', '.join(CONTROLS)}.")


@dataclass
class DonorRun:
    """Answers with the last span of another sample.

    Args:
        run ([`Run`]): of all questions; those without a donor keep their latents.
        donors (`dict[int, int]`): sample and donor.
        follows (`dict[int, bool]`): by sample, whether the answer is the one that the donor's span leads to.
        stays (`dict[int, bool]`): by sample, whether it is the sample's own right answer.
    """

    run: Run
    donors: dict[int, int]
    follows: dict[int, bool]
    stays: dict[int, bool]


def follow_donors(evaluator: Evaluator, own: Run) -> DonorRun | None:
    """Does the answer become the donor's, if only the last span of latents is taken from another sample?

    Donors have as many spans and lead to another answer by [`~ilvr.tasks.Task.donor_reference`].

    Args:
        evaluator ([`Evaluator`]): of questions of a task.
        own ([`Run`]): with its latents, from [`run_controls`].

    Returns:
        [`DonorRun`], or `None` if the task does not know what follows from a donor's span, or no sample has a donor.
    """
    assert own.latents is not None
    task, questions, latents = evaluator.questions.task, evaluator.questions, own.latents
    if task is None:
        return None
    donors, expected = {}, {}
    for sample in range(len(questions)):
        for step in range(1, len(questions)):
            donor = (sample + step) % len(questions)
            if not len(latents[sample]) or len(latents[donor]) != len(latents[sample]):
                continue
            leads_to = task.donor_reference(questions.samples[sample], questions.samples[donor])
            if leads_to is not None and leads_to != questions.references[sample]:
                donors[sample], expected[sample] = donor, leads_to
                break
    if not donors:
        return None

    def options(batch: range) -> dict[str, Any]:
        return {"latent_intervention": _replace_last(batch, donors, latents)}

    run = evaluator.run("donor_last_span", options)
    answers = [run.answers[sample] for sample in donors]
    follows = questions.is_right(answers, list(expected.values()))
    stays = [run.records[sample].right for sample in donors]
    return DonorRun(run, donors, dict(zip(donors, follows)), dict(zip(donors, stays)))


def _replace_last(batch: range, donors: dict[int, int], own: list[torch.Tensor]) -> Intervention:
    replace = replace_by([own[donors.get(sample, sample)] for sample in batch])
    last = torch.tensor([len(own[sample]) - 1 if sample in donors else -1 for sample in batch])

    def intervene(latents: torch.Tensor, span: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        is_last = (span.cpu() == last) & (last >= 0)
        return torch.where(is_last.to(latents.device).unsqueeze(1), replace(latents, span, index), latents)

    return intervene
