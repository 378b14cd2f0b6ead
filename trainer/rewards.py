r"""Rewards for [`ILVRGRPOTrainer`]: is the answer right, has it the right form, were latents used.

A reward is TRL's: a function of `completions` (conversations of one assistant turn), `completion_ids` and the columns
of the data set that returns a number for each completion, or `None` where it has no opinion. [`ILVRGRPOTrainer`] adds
`latents`: of each completion those of its rollout, (spans, K, D).
"""

import math
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from ilvr import ILVRProcessor
from ilvr.data.conversations import last_boxed
from ilvr.evaluation import load_metric
from ilvr.evaluation.metrics import score_each


def load_rewards(names: Iterable[str], *, metric: str, processor: ILVRProcessor) -> list[Callable[..., Any]]:
    """Rewards by their names: `accuracy`, `format`, `span` and `latent_contrast`.

    Args:
        names (`Iterable[str]`).
        metric (`str`): says which answers are right, see [`accuracy_reward`].
        processor ([`ILVRProcessor`]).

    Raises:
        ValueError: names the rewards that there are not.
    """
    known: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: accuracy_reward(metric),
        "format": lambda: format_reward,
        "span": lambda: span_reward(processor),
        "latent_contrast": lambda: latent_contrast_reward(metric),
    }
    names = list(names)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"There are no rewards {', '.join(unknown)}; choose from {', '.join(known)}.")
    return [known[name]() for name in names]


def accuracy_reward(metric: str) -> Callable[..., list[float]]:
    """Whether the answer is right by a metric of ours, such as a task's: 1 or 0.

    Args:
        metric (`str`): a name or path for [`~ilvr.evaluation.load_metric`]. It compares answers with the column
            `reference` of the data set.

    Raises:
        ValueError: if there is no such metric.
    """
    loaded = load_metric(metric)

    def accuracy(completions: list[list[dict[str, Any]]], reference: list[Any], **kwargs: Any) -> list[float]:
        return [float(right) for right in score_each(loaded, _texts(completions), reference)]

    return accuracy


def format_reward(completions: list[list[dict[str, Any]]], **kwargs: Any) -> list[float]:
    r"""Whether the answer gives itself in exactly one \boxed{…}: 1 or 0."""
    return [float(text.count("\\boxed{") == 1 and last_boxed(text) is not None) for text in _texts(completions)]


def span_reward(processor: ILVRProcessor) -> Callable[..., list[float | None]]:
    """A bonus for opening a span of latents: 1 or 0, however many are opened.

    Without one, emission may fall: words are rewarded, and a model that is right without latents loses nothing by
    leaving them out. The column `has_spans` of the data set, if there is one, says which samples it is for: those for
    whose questions the supervised model did open spans.

    Args:
        processor ([`ILVRProcessor`]): knows the id of `<|latent_start|>`.
    """
    start_id = processor.latent_token_ids[0]

    def opens_span(
        completion_ids: list[list[int]], has_spans: list[bool] | None = None, **kwargs: Any
    ) -> list[float | None]:
        asked = [True] * len(completion_ids) if has_spans is None else has_spans
        return [float(start_id in ids) if ask else None for ids, ask in zip(completion_ids, asked)]

    return opens_span


def latent_contrast_reward(metric: str, temperature: float = 0.5) -> Callable[..., list[float]]:
    r"""Latents like those of right answers to the same question, and unlike those of wrong ones: R_ctr of Future-L1
    (arXiv 2606.05769), as its code computes it.

    With $s(a, b)$ the mean of $(1 + \cos) / 2$ over the latents of two rollouts in their order, up to the shorter's
    end, $p$ the largest $s / \tau$ to another right rollout of the group (to itself, if it is the only right one)
    and $N = \sum e^{s / \tau}$ over the wrong ones: $e^p / (e^p + N)$, $1 / (1 + N)$ where no rollout is right, and
    $p$ where none is wrong. A wrong rollout is among the wrong ones itself. Without latents it is 0.

    A group is what follows each other with the same prompt. Rows that another process has are not seen, so let
    `per_device_train_batch_size` be a multiple of `num_generations`.

    Args:
        metric (`str`): says which answers are right, as for [`accuracy_reward`].
        temperature (`float`): $\tau$.

    Raises:
        ValueError: if there is no such metric, or `temperature` is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it has to be above 0.")
    loaded = load_metric(metric)

    def latent_contrast(
        prompts: list[Any],
        completions: list[list[dict[str, Any]]],
        latents: list[torch.Tensor],
        reference: list[Any],
        **kwargs: Any,
    ) -> list[float]:
        right = score_each(loaded, _texts(completions), reference)
        rewards: list[float] = []
        for _, group in groupby(range(len(prompts)), key=prompts.__getitem__):
            rows = list(group)
            rewards += _contrast([latents[row] for row in rows], [bool(right[row]) for row in rows], temperature)
        return rewards

    return latent_contrast


def _contrast(latents: list[torch.Tensor], right: list[bool], temperature: float) -> list[float]:
    """Rewards of the rollouts of one group."""
    used = [row for row, own in enumerate(latents) if len(own)] if len(latents) > 1 else []
    rights, wrongs = [row for row in used if right[row]], [row for row in used if not right[row]]
    rewards = [0.0] * len(latents)
    for row in used:
        near = {other: _similarity(latents[row], latents[other]) / temperature for other in used}
        nearest = max((near[other] for other in rights if other != row or len(rights) == 1), default=None)
        wrong = sum(math.exp(near[other]) for other in wrongs)
        if nearest is None:
            rewards[row] = 1 / (1 + wrong)
        elif not wrongs:
            rewards[row] = nearest
        else:
            rewards[row] = math.exp(nearest) / (math.exp(nearest) + wrong)
    return rewards


def _similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean of (1 + cos) / 2 over latents in their order; of latents (spans, K, D)."""
    a, b = a.flatten(0, 1).float(), b.flatten(0, 1).float()
    shared = min(len(a), len(b))
    return (1 + cosine_similarity(a[:shared], b[:shared], dim=-1)).mean().item() / 2


def _texts(completions: list[list[dict[str, Any]]]) -> list[str]:
    """The words of completions, without latents and other special tokens."""
    return [completion[0]["content"] for completion in completions]
