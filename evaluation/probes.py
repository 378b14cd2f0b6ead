"""What latents hold, as far as it can be read off them: a linear probe, the patch they are nearest to, their norms.

N image tokens, K latents a span, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from .intervals import wilson_interval


@dataclass(frozen=True)
class Rate:
    """A rate of successes, with its Wilson 95 % interval."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, successes: int, count: int) -> "Rate":
        """The rate of `successes` among `count`; 0 of 0 is 0, anywhere from 0 to 1."""
        return cls(successes / max(count, 1), *wilson_interval(successes, count), count)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} – {100 * self.high:.1f})"


@dataclass(frozen=True)
class Probe:
    """How well a linear probe reads labels off held-out latents.

    Args:
        accuracy (`Rate`): on samples that it was not trained on.
        baseline (`float`): accuracy, there, of the label that is most frequent in training.
        classes (`int`): labels in training.
        trained_on (`int`): spans of the other samples.
    """

    accuracy: Rate
    baseline: float
    classes: int
    trained_on: int


def linear_probe(
    features: torch.Tensor, labels: torch.Tensor, samples: torch.Tensor, *, weight_decay: float = 1.0, seed: int = 0
) -> Probe:
    """Trains a multinomial logistic regression on the spans of half of the samples, and tests it on the other half.

    Args:
        features (`torch.Tensor` of shape `(M, F)`): of M spans, such as their K latents one after the other.
        labels (`torch.LongTensor` of shape `(M,)`): what is to be read, such as the patch that is followed.
        samples (`torch.LongTensor` of shape `(M,)`): the sample of each span; no sample is on both sides.
        weight_decay (`float`, *optional*, defaults to 1.0): of the squared weights, over the number of spans.
        seed (`int`, *optional*, defaults to 0): of the choice of samples.

    Returns:
        [`Probe`].

    Raises:
        ValueError: if there are spans of fewer than two samples.
    """
    numbers = samples.unique()
    if len(numbers) < 2:
        raise ValueError(f"A probe is tested on other samples than it is trained on, got {len(numbers)}. Add samples.")
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    is_train = torch.isin(samples, numbers[order[: (len(numbers) + 1) // 2]])
    train, train_labels = features[is_train].float(), labels[is_train]
    mean, std = train.mean(0), train.std(0, correction=0).clamp(min=1e-6)
    classes = int(labels.max()) + 1
    weight, bias = _logistic_regression((train - mean) / std, train_labels, classes, weight_decay)
    predicted = ((features[~is_train].float() - mean) / std @ weight + bias).argmax(-1)
    held_out = labels[~is_train]
    usual = train_labels.bincount().argmax()
    return Probe(
        Rate.of(int((predicted == held_out).sum()), len(held_out)),
        int((held_out == usual).sum()) / len(held_out),
        len(train_labels.unique()),
        len(train_labels),
    )


def _logistic_regression(
    features: torch.Tensor, labels: torch.Tensor, classes: int, weight_decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.zeros(features.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = cross_entropy(features @ weight + bias, labels)
        value = value + weight_decay * weight.square().sum() / (2 * len(labels))
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()


def nearest_patches(latents: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """The image token that each latent is nearest to, by cosine, as `retrieval_at_1` of training counts it.

    Args:
        latents (`torch.Tensor` of shape `(K, D)`): of a span.
        picture (`torch.Tensor` of shape `(N, D)`): features of the span's helper image.

    Returns:
        `torch.LongTensor` of shape `(K,)`.
    """
    return torch.cosine_similarity(latents.float().unsqueeze(1), picture.float().unsqueeze(0), dim=-1).argmax(-1)


def mean_norm(vectors: Sequence[torch.Tensor]) -> float | None:
    """Mean norm of the rows of some tensors (…, D); `None` for none."""
    norms = [rows.float().norm(dim=-1).flatten() for rows in vectors if rows.numel()]
    return float(torch.cat(norms).mean()) if norms else None
