"""One span of one answer, with something else in its place: what the rest of the answer becomes.

Controls replace all spans of many answers, to count; this replaces one span, to look at.

K latents a span, D hidden.
"""

import difflib
import re
from typing import NamedTuple

import torch

from ilvr.latent_decoding import Intervention

from .streaming import CHIP


WORD = re.compile(rf"{CHIP.pattern}|\S+")


class Replacement(NamedTuple):
    """What one span gets.

    Args:
        label (`str`): says what it is.
        latents (`torch.Tensor` of shape `(K, D)`, *optional*): `None` leaves the span its own.
    """

    label: str
    latents: torch.Tensor | None


def replacements(own: torch.Tensor, donor: torch.Tensor | None, donor_label: str) -> list[Replacement]:
    """What a span is replaced with: another span, noise in two draws, zeros; and nothing, which must change nothing.

    Args:
        own (`torch.Tensor` of shape `(K, D)`): the span as it was generated.
        donor (`torch.Tensor` of shape `(K, D)`, *optional*): a span of another answer.
        donor_label (`str`): says where that is from.
    """
    return [
        Replacement("its own again", None),
        *([] if donor is None else [Replacement(donor_label, donor)]),
        Replacement("noise of its norm", noise_like(own, seed=0)),
        Replacement("noise, another draw", noise_like(own, seed=1)),
        Replacement("zeros", torch.zeros_like(own)),
    ]


def noise_like(latents: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal noise with the norm of each latent (K, D)."""
    drawn = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    return drawn * latents.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)


def replace_span(number: int, latents: torch.Tensor) -> Intervention:
    """Puts latents into one span, and leaves all others as the model makes them.

    Args:
        number (`int`): of the span in the answer, from 0.
        latents (`torch.Tensor` of shape `(K, D)`).

    Returns:
        `Callable`: an intervention for `generate`.
    """

    def intervene(fed_back: torch.Tensor, span: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        given = latents.to(fed_back)[index.clamp(min=0)]
        return torch.where((span == number).unsqueeze(1), given, fed_back)

    return intervene


def compare_words(original: str, changed: str) -> list[tuple[str, bool]]:
    """The words and chips of `changed`, each with whether it differs from `original`."""
    before, after = ([match.group() for match in WORD.finditer(text)] for text in (original, changed))
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    same = {block.b + i for block in blocks for i in range(block.size)}
    return [(word, i not in same) for i, word in enumerate(after)]
