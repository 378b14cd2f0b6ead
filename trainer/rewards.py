r"""Rewards for [`ILVRGRPOTrainer`]: is the answer right, has it the right form, were latents used.

A reward is TRL's: a function of `completions` (conversations of one assistant turn), `completion_ids` and the columns
of the data set that returns a number for each completion, or `None` where it has no opinion.
"""

from collections.abc import Callable
from typing import Any

from ilvr import ILVRProcessor
from ilvr.data.conversations import last_boxed
from ilvr.evaluation import load_metric
from ilvr.evaluation.metrics import score_each


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


def _texts(completions: list[list[dict[str, Any]]]) -> list[str]:
    """The words of completions, without latents and other special tokens."""
    return [completion[0]["content"] for completion in completions]
