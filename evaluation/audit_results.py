"""What an audit finds: numbers under controls, what latents hold, a verdict."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ilvr import __version__

from .controls import DonorRun
from .probes import Probe, Rate
from .statistics import Difference


SIGNIFICANT = 0.05  # of p-values after Holm's adjustment
RELEVANT = 0.05  # accuracy: a smaller difference is no use to speak of
RARE = 0.5  # share of samples without a span, from which on latents are rare


@dataclass(frozen=True)
class ControlResult:
    """What answers under a control come to, beside the model's own.

    Args:
        accuracy (`Rate`).
        answers_changed (`float`): share of samples whose answer, as the metric reads it, is another than the own one.
        spans_per_sample (`float`), without_span (`float`): mean number of spans, share of samples that have none.
        difference (`Difference`): accuracy of the own answers less this one.
        p_value (`float`): McNemar's exact test of it.
        p_adjusted (`float`): the same after Holm's adjustment over the controls of this model.
    """

    accuracy: Rate
    answers_changed: float
    spans_per_sample: float
    without_span: float
    difference: Difference
    p_value: float
    p_adjusted: float

    @property
    def falls(self) -> bool:
        """Whether accuracy is lower under the control, beyond chance."""
        return self.difference.value > 0 and self.p_adjusted < SIGNIFICANT


@dataclass(frozen=True)
class DonorFollowing:
    """With the last span of another sample: how often the answer is what that leads to, how often the right one."""

    follows: Rate
    stays: Rate

    @classmethod
    def of(cls, donors: DonorRun) -> "DonorFollowing":
        count = len(donors.donors)
        return cls(Rate.of(sum(donors.follows.values()), count), Rate.of(sum(donors.stays.values()), count))


@dataclass(frozen=True)
class LatentContent:
    """What generated latents hold, measured on the spans that have a helper image of their number.

    Args:
        norm (`float`, *optional*): mean norm of the latents.
        feature_norm (`float`, *optional*): mean norm of what they should hold, or of all features of the helper images
            where that is not known.
        retrieval_at_1 (`Rate`, *optional*): latents that are nearest, among the patches of their helper image, to the
            one that they should hold.
        retrieval_by_span (`list[Rate]`, *optional*): the same for each number of a span.
        patches (`int`, *optional*): mean number of patches of a helper image; by chance one in so many is right.
        probe (`Probe`, *optional*): reads that patch off the latents of a span.
        ceiling (`Probe`, *optional*): the same probe on the features of these patches themselves.
    """

    norm: float | None = None
    feature_norm: float | None = None
    retrieval_at_1: Rate | None = None
    retrieval_by_span: list[Rate] | None = None
    patches: float | None = None
    probe: Probe | None = None
    ceiling: Probe | None = None

    @property
    def norm_ratio(self) -> float | None:
        """Norm of the latents over that of what they should hold."""
        return self.norm / self.feature_norm if self.norm and self.feature_norm else None


@dataclass(frozen=True)
class Verdict:
    """What follows from the numbers, by the rules of `docs/audit.md`: a word, and sentences that say why."""

    word: str
    reasons: list[str]


@dataclass(frozen=True)
class ModelAudit:
    """The audit of one model.

    Args:
        model (`str`): folder or Hub id.
        accuracy (`Rate`): of the own answers.
        spans_per_sample (`float`), without_span (`float`): mean number of spans, share of samples that have none.
        controls (`dict[str, ControlResult]`): by name.
        content (`LatentContent`).
        donor_following (`DonorFollowing`, *optional*): if the task says what a donor's span leads to.
        verdict (`Verdict`).
    """

    model: str
    accuracy: Rate
    spans_per_sample: float
    without_span: float
    controls: dict[str, ControlResult]
    content: LatentContent
    donor_following: DonorFollowing | None
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; `Rate` and `Difference` become dicts of their numbers."""
        plain = asdict(self)
        for name, control in self.controls.items():
            plain["controls"][name]["difference"] = control.difference._asdict()
        plain["content"]["norm_ratio"] = self.content.norm_ratio
        return plain


@dataclass
class Audit:
    """Audits of models on the same questions.

    Args:
        questions (`str`): their name.
        metric (`str`): what is right.
        samples (`int`).
        models (`list[ModelAudit]`).
        settings (`dict`): of the run.
    """

    questions: str
    metric: str
    samples: int
    models: list[ModelAudit] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file, with the rules of the verdict."""
        rules = {"significant": SIGNIFICANT, "relevant": RELEVANT, "rare": RARE}
        plain = {name: value for name, value in vars(self).items() if name != "models"}
        return {**plain, "ilvr": __version__, "rules": rules, "models": [model.to_dict() for model in self.models]}
