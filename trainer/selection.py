"""Which features of a helper image a span's latents are aligned with (paper, section 3.2).

Pure functions. Shapes: B batch, T sequence, S spans, K latents a span, N candidates of a picture, D hidden.

A selector is a function of one signature: what there is to look at ([`SelectionInputs`]), the number of the span, and
what was selected for the span before (`None` for the first). A new one is that function and a line in `SELECTORS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn.functional import normalize, pad
from torch.nn.utils.rnn import pad_sequence


class SpanSelection(NamedTuple):
    """What was selected for one span of each row.

    Args:
        targets (`torch.Tensor` of shape `(B, K, D)`): by falling score, zero where `mask` is false.
        mask (`torch.BoolTensor` of shape `(B, K)`): the first K*.
        indices (`torch.LongTensor` of shape `(B, K)`): of the targets among the candidates.
        mass (`torch.Tensor` of shape `(B,)`): probability that the targets hold, or the share of candidates used.
    """

    targets: torch.Tensor
    mask: torch.Tensor
    indices: torch.Tensor
    mass: torch.Tensor


class Queries(NamedTuple):
    """What the teacher asks of the helper images.

    Args:
        whole (`torch.Tensor` of shape `(B, D)`): u, see [`global_query`].
        text (`torch.Tensor` of shape `(B, S, D)`): mean states of the words before each span.
        has_text (`torch.BoolTensor` of shape `(B, S)`): whether there are such words.
    """

    whole: torch.Tensor
    text: torch.Tensor
    has_text: torch.Tensor


@dataclass
class SelectionInputs:
    """What a selector may look at.

    Args:
        candidates (`torch.Tensor` of shape `(B, S, N, D)`): features of the helper images.
        candidate_mask (`torch.BoolTensor` of shape `(B, S, N)`): which candidates exist.
        max_selected (`int`): K.
        top_p (`float`), temperature (`float`): of [`top_p_selection`].
        queries ([`Queries`], *optional*): for selectors that read the teacher, see [`Selector`].
        relevance (`torch.Tensor` of shape `(B, S, N)`, *optional*): for selectors that ask the teacher about each
            helper image: how much its answer depends on each candidate, see [`~relevance.AnswerRelevance`]; for the
            oracle, 1 for the candidate that is known to be the right one.
        encode_user_pictures (`Callable`, *optional*): gives the candidates (B, N, D) of each row's last user image
            and their mask (B, N); called only if a selector asks for them.
    """

    candidates: torch.Tensor
    candidate_mask: torch.Tensor
    max_selected: int
    top_p: float = 0.9
    temperature: float = 0.05
    queries: Queries | None = None
    relevance: torch.Tensor | None = None
    encode_user_pictures: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None

    @cached_property
    def _user_pictures(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.encode_user_pictures is not None
        return self.encode_user_pictures()

    def picture_before(self, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates (B, N, D), with their mask (B, N), of the picture that a helper image follows.

        That is the helper image of the span before, and for the first span the user's last image.
        """
        if span == 0:
            return self._user_pictures
        return self.candidates[:, span - 1], self.candidate_mask[:, span - 1]


@dataclass
class Selection:
    """What was selected for all spans of a batch, and among what.

    Args:
        targets (`torch.Tensor` of shape `(B, S, K, D)`): by falling score, zero where `mask` is false.
        mask (`torch.BoolTensor` of shape `(B, S, K)`): the first K* of each span.
        indices (`torch.LongTensor` of shape `(B, S, K)`): of the targets among the candidates.
        mass (`torch.Tensor` of shape `(B, S)`, *optional*): probability that the targets hold; unknown if they were
            selected before training.
        candidates (`torch.Tensor` of shape `(B, S, N, D)`): features of the helper images.
        candidate_mask (`torch.BoolTensor` of shape `(B, S, N)`): which candidates exist; none in a span that does not.
        followed (`torch.BoolTensor` of shape `(B, S, N)`, *optional*): the candidate that the data says is followed,
            none in a span where it says nothing.
    """

    targets: torch.Tensor
    mask: torch.Tensor
    indices: torch.Tensor
    mass: torch.Tensor | None
    candidates: torch.Tensor
    candidate_mask: torch.Tensor
    followed: torch.Tensor | None = None

    def statistics(self) -> dict[str, torch.Tensor]:
        """Means over the spans: K*, the share of spans with each K* from 1 to K, and the selected mass."""
        exists = self.mask.any(-1)  # (B, S)
        repeats = (
            self.indices.diff(dim=-1, prepend=torch.full_like(self.indices[..., :1], -1)) == 0
        )  # see `fill_slots`
        counts = (self.mask & ~repeats).sum(-1)[exists]  # (spans,)
        shares = {f"selected_{k}": (counts == k).float().mean() for k in range(1, self.mask.shape[-1] + 1)}
        mass = {} if self.mass is None else {"selected_mass": self.mass[exists].mean()}
        return {"selected_per_span": counts.float().mean(), **mass, **shares}

    def holds_followed(self) -> torch.Tensor:
        """For each span in which a candidate is known to be followed, whether it was selected: (known spans,)."""
        if self.followed is None:
            return self.mask.new_zeros(0)
        found = (self.followed.gather(2, self.indices) & self.mask).any(-1)  # (B, S)
        return found[self.followed.any(-1)]

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """The candidate (B, S, K) that each of `latents` (B, S, K, D) resembles most, by cosine as in the loss."""
        unit = normalize(self.candidates, dim=-1)
        scores = torch.einsum("bskd,bsnd->bskn", latents.to(unit.dtype), unit)
        return scores.masked_fill(~self.candidate_mask.unsqueeze(2), -torch.inf).argmax(-1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` (…, T, D) over the columns where `mask` (…, T) is true; zero where there are none."""
    weights = mask.to(values.dtype)
    total = torch.einsum("...td,...t->...d", values, weights)
    return total / weights.sum(-1, keepdim=True).clamp(min=1)


def group_candidates(features: torch.Tensor, max_candidates: int) -> torch.Tensor:
    """Averages a long feature map into `max_candidates` contiguous groups of nearly equal size.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): features of one image in raster order.
        max_candidates (`int`): 256 in the paper.

    Returns:
        `torch.Tensor` of shape `(min(N, max_candidates), D)`.
    """
    if len(features) <= max_candidates:
        return features
    return torch.stack([group.mean(0) for group in features.tensor_split(max_candidates)])


def pad_candidates(groups: list[torch.Tensor], counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lays the candidates of all helper images of a batch out by sample and span.

    Args:
        groups (`list[torch.Tensor]`): candidates (N, D) of each helper image.
        counts (`torch.LongTensor` of shape `(B,)`): helper images of each sample.

    Returns:
        `tuple`: candidates (B, S, N, D) and the mask (B, S, N) of those that exist.
    """
    padded = pad_sequence(groups, batch_first=True)  # (images, N, D)
    lengths = torch.tensor([len(group) for group in groups], device=counts.device)
    places = torch.arange(padded.shape[1], device=counts.device)
    owner = torch.arange(int(counts.max()), device=counts.device) < counts.unsqueeze(1)  # (B, S): the spans there are
    candidates = padded.new_zeros(*owner.shape, *padded.shape[1:])
    candidates[owner] = padded
    candidate_mask = torch.zeros(candidates.shape[:3], dtype=torch.bool, device=counts.device)
    candidate_mask[owner] = places < lengths.unsqueeze(1)
    return candidates, candidate_mask


def global_query(hidden: torch.Tensor, prompt_mask: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
    """u, what the question asks of the picture (B, D).

    The mean of r_txt, the mean of the teacher's states over the prompt's text tokens, and r_img, its states over the
    image tokens weighted by softmax(h_prompt h_img^T / sqrt(D)), averaged over the prompt tokens. The original derives
    the weights from the last layer's projections by hand, without norm or rotary positions, and falls back silently to
    this form; here this form always, for it needs no access to one backbone's attention modules.

    Args:
        hidden (`torch.Tensor` of shape `(B, T, D)`): the teacher's last-layer hidden states.
        prompt_mask (`torch.BoolTensor` of shape `(B, T)`): text tokens of the prompt.
        image_mask (`torch.BoolTensor` of shape `(B, T)`): image tokens of the prompt.
    """
    scores = hidden @ hidden.transpose(1, 2) / math.sqrt(hidden.shape[-1])  # (B, T prompt, T image)
    scores = scores.masked_fill(~image_mask.unsqueeze(1), torch.finfo(scores.dtype).min)
    pooling = masked_mean(scores.softmax(-1), prompt_mask)  # (B, T image)
    pooling = pooling * image_mask
    r_img = torch.einsum("btd,bt->bd", hidden, pooling)
    r_txt = masked_mean(hidden, prompt_mask)
    has_image = image_mask.any(1, keepdim=True)
    return torch.where(has_image, (r_img + r_txt) / 2, r_txt)


def span_text_masks(
    input_ids: torch.Tensor, assistant_mask: torch.Tensor, latent_ids: tuple[int, int, int], num_spans: int
) -> torch.Tensor:
    """Where the words just before each span stand.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, T)`).
        assistant_mask (`torch.BoolTensor` of shape `(B, T)`): tokens of the assistant's turns.
        latent_ids (`tuple[int, int, int]`): ids of the start, pad and end tokens.
        num_spans (`int`): S.

    Returns:
        `torch.BoolTensor` of shape `(B, S, T)`: the assistant's words after span s - 1 and before span s.
    """
    starts = (input_ids == latent_ids[0]).long()
    spans_before = starts.cumsum(1) - starts  # (B, T): number of spans that started before this column
    words = assistant_mask & ~torch.isin(input_ids, torch.tensor(latent_ids, device=input_ids.device))
    return words.unsqueeze(1) & (
        spans_before.unsqueeze(1) == torch.arange(num_spans, device=input_ids.device)[:, None]
    )


def top_p_selection(
    scores: torch.Tensor, candidate_mask: torch.Tensor, *, top_p: float, max_selected: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keeps the smallest set of candidates that holds `top_p` of the probability, at most `max_selected`.

    Args:
        scores (`torch.Tensor` of shape `(B, N)`): cosine of each candidate with the query.
        candidate_mask (`torch.BoolTensor` of shape `(B, N)`): which candidates exist.
        top_p (`float`): 0.9 in the paper.
        max_selected (`int`): K.
        temperature (`float`): tau of softmax(score / tau). With the paper's 1.0, cosines are so flat that 8 of 15 or
            more candidates never hold 0.9, and K are kept always.

    Returns:
        `tuple`: indices (B, K) by falling score, a mask (B, K) of those selected, and the mass (B,) that they hold.
    """
    scores = scores.masked_fill(~candidate_mask, -torch.inf)
    probabilities = torch.nan_to_num((scores / temperature).softmax(-1))  # rows without candidates: all zero
    width = min(max_selected, scores.shape[1])
    mass, indices = probabilities.topk(width, dim=-1)
    mass_before = mass.cumsum(-1) - mass
    selected = (mass_before < top_p) & candidate_mask.gather(1, indices)
    kept_mass = (mass * selected).sum(-1)
    missing = max_selected - width
    if missing:
        indices = pad(indices, (0, missing))
        selected = pad(selected, (0, missing))
    return indices, selected, kept_mass


def select_by_query(inputs: SelectionInputs, span: int, previous: SpanSelection | None) -> SpanSelection:
    """The teacher's query (paper, equations 3 to 6).

    q_s is the mean of u, of the mean state of the words before span s (if there are any), and of the mean of the
    features selected for span s - 1 (if there is one). The candidates nearest to it, by cosine, that together hold
    `top_p` of the probability are kept, at most K.
    """
    candidates, candidate_mask = inputs.candidates[:, span], inputs.candidate_mask[:, span]
    assert inputs.queries is not None  # the selector reads the teacher
    whole, text, has_text = inputs.queries.whole, inputs.queries.text[:, span], inputs.queries.has_text[:, span]
    if previous is None:
        before, has_before = torch.zeros_like(whole), torch.zeros_like(has_text)
    else:
        before, has_before = masked_mean(previous.targets, previous.mask), previous.mask.any(1)
    weights = torch.stack([torch.ones_like(has_before), has_text, has_before], 1).to(candidates.dtype)  # (B, 3)
    parts = torch.stack([whole, text, before], 1)  # (B, 3, D)
    query = (parts * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)  # (B, D)
    scores = torch.cosine_similarity(candidates, query.unsqueeze(1), dim=-1)  # (B, N)
    indices, mask, mass = top_p_selection(
        scores,
        candidate_mask,
        top_p=inputs.top_p,
        max_selected=inputs.max_selected,
        temperature=inputs.temperature,
    )
    return SpanSelection(_gather(candidates, indices, mask), mask, indices, mass)


def select_uniform(inputs: SelectionInputs, span: int, previous: SpanSelection | None = None) -> SpanSelection:
    """A baseline: K candidates at equal distances in raster order."""
    candidates, counts = inputs.candidates[:, span], inputs.candidate_mask[:, span].sum(-1, keepdim=True)  # (B, 1)
    slots = torch.arange(inputs.max_selected, device=candidates.device)
    used = counts.clamp(max=inputs.max_selected)
    indices = _starts(slots, counts, used).clamp(max=candidates.shape[1] - 1)
    mask = slots < used  # (B, K)
    return SpanSelection(_gather(candidates, indices, mask), mask, indices * mask, _share(used, counts, candidates))


def select_mean_pool(inputs: SelectionInputs, span: int, previous: SpanSelection | None = None) -> SpanSelection:
    """A baseline: K contiguous groups of candidates, averaged, as in Mirage (arXiv 2506.17218)."""
    candidates, mask = inputs.candidates[:, span], inputs.candidate_mask[:, span]
    uniform = select_uniform(inputs, span)
    counts, slots = mask.sum(-1, keepdim=True), torch.arange(inputs.max_selected, device=mask.device)
    ends = _starts(slots + 1, counts, counts.clamp(max=inputs.max_selected))  # (B, K)
    places = torch.arange(candidates.shape[1], device=mask.device)
    groups = (places >= uniform.indices.unsqueeze(-1)) & (places < ends.unsqueeze(-1)) & mask.unsqueeze(1)  # (B, K, N)
    targets = masked_mean(candidates.unsqueeze(1), groups) * uniform.mask.unsqueeze(-1)
    return uniform._replace(targets=targets)


def select_random(inputs: SelectionInputs, span: int, previous: SpanSelection | None = None) -> SpanSelection:
    """A baseline: K candidates drawn without replacement."""
    candidates, exists = inputs.candidates[:, span], inputs.candidate_mask[:, span]
    counts = exists.sum(-1, keepdim=True)  # (B, 1)
    used = counts.clamp(max=inputs.max_selected)
    noise = torch.rand(exists.shape, device=exists.device).masked_fill(~exists, -1.0)
    indices = noise.argsort(-1, descending=True)
    indices = pad(indices, (0, max(0, inputs.max_selected - exists.shape[1])))[:, : inputs.max_selected]
    mask = torch.arange(inputs.max_selected, device=exists.device) < used
    return SpanSelection(_gather(candidates, indices, mask), mask, indices * mask, _share(used, counts, candidates))


def select_change(inputs: SelectionInputs, span: int, previous: SpanSelection | None = None) -> SpanSelection:
    """The candidates that differ most from the same places of the picture before (ours).

    The score is the distance of the features over the largest one of the picture; those that together hold `top_p` of
    the probability are kept, at most K. Where there is no picture before, all candidates count the same.

    Raises:
        ValueError: if the two pictures have other numbers of candidates: their places cannot be compared.
    """
    candidates, exists = inputs.candidates[:, span], inputs.candidate_mask[:, span]
    before, existed = inputs.picture_before(span)
    counts, earlier = exists.sum(1), existed.sum(1)  # (B,)
    compared = (counts > 0) & (earlier > 0)
    if (counts != earlier)[compared].any():
        row = int(((counts != earlier) & compared).nonzero()[0])
        raise ValueError(
            f"Helper image {span} of row {row} has {int(counts[row])} candidates, the one before {int(earlier[row])}. "
            "selection_method='change' compares the same places: give both pictures the same size."
        )
    width = candidates.shape[1]
    before = pad(before, (0, 0, 0, max(0, width - before.shape[1])))[:, :width]
    distances = (candidates - before).norm(dim=-1).masked_fill(~(exists & compared.unsqueeze(1)), 0)  # (B, N)
    scores = distances / distances.amax(1, keepdim=True).clamp(min=torch.finfo(distances.dtype).tiny)
    indices, mask, mass = top_p_selection(
        scores, exists, top_p=inputs.top_p, max_selected=inputs.max_selected, temperature=inputs.temperature
    )
    return SpanSelection(_gather(candidates, indices, mask), mask, indices, mass)


def select_by_relevance(inputs: SelectionInputs, span: int, previous: SpanSelection | None) -> SpanSelection:
    """The candidates of most relevance (ours), such as those that the teacher's own answer depends on.

    A candidate's share is its relevance over the sum of all; those that together hold `top_p` are kept, at most K.
    """
    assert inputs.relevance is not None  # the selector has it
    candidates, exists = inputs.candidates[:, span], inputs.candidate_mask[:, span]
    relevance = inputs.relevance[:, span]
    indices, mask, mass = top_p_selection(
        relevance.clamp(min=torch.finfo(relevance.dtype).tiny).log(),
        exists,
        top_p=inputs.top_p,
        max_selected=inputs.max_selected,
        temperature=1.0,
    )
    return SpanSelection(_gather(candidates, indices, mask), mask, indices, mass)


def fill_slots(selected: SpanSelection) -> SpanSelection:
    """Repeats the last target in the slots behind it, where inference feeds latents, too."""
    last = (selected.mask.sum(-1, keepdim=True) - 1).clamp(min=0)  # (B, 1)
    slots = torch.arange(selected.mask.shape[1], device=last.device)
    slots = torch.minimum(slots.expand_as(selected.mask), last)  # (B, K)
    targets = selected.targets.gather(1, slots.unsqueeze(-1).expand_as(selected.targets))
    mask = selected.mask.any(-1, keepdim=True).expand_as(selected.mask)
    return selected._replace(targets=targets, mask=mask, indices=selected.indices.gather(1, slots))


class Selector(NamedTuple):
    """A way to select targets.

    Args:
        select (`Callable`): as the functions above.
        reads_teacher (`bool`, *optional*, defaults to `False`): whether it needs the queries of [`SelectionInputs`],
            which cost a forward pass of the teacher.
        asks_teacher (`bool`, *optional*, defaults to `False`): whether it needs their `relevance`, which costs an
            answer of the teacher to a question about each helper image, and a forward over it.
        trace_answers (`bool`, *optional*, defaults to `True`): whether, without a question, what a trace says after a
            helper image may be the answer.
        reads_followed (`bool`, *optional*, defaults to `False`): whether `relevance` is what the data says.
        keeps_candidates (`bool`, *optional*, defaults to `True`): whether targets are candidates as they are.
    """

    select: Callable[[SelectionInputs, int, SpanSelection | None], SpanSelection]
    reads_teacher: bool = False
    asks_teacher: bool = False
    trace_answers: bool = True
    reads_followed: bool = False
    keeps_candidates: bool = True


SELECTORS = {
    "query_top_p": Selector(select_by_query, reads_teacher=True),
    "answer_gradient": Selector(select_by_relevance, asks_teacher=True),
    # A trace's many words hang on many patches: what they lose says little (docs/training.md).
    "answer_occlusion": Selector(select_by_relevance, asks_teacher=True, trace_answers=False),
    "attention": Selector(select_by_relevance, asks_teacher=True),
    "change": Selector(select_change),
    "mean_pool": Selector(select_mean_pool, keeps_candidates=False),
    "uniform": Selector(select_uniform),
    "random": Selector(select_random),
    "followed": Selector(select_by_relevance, reads_followed=True),
}


def _gather(candidates: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The candidates (B, K, D) of `indices` (B, K), zero where `mask` is false."""
    chosen = candidates.gather(1, indices.unsqueeze(-1).expand(-1, -1, candidates.shape[-1]))
    return chosen * mask.unsqueeze(-1)


def _starts(slots: torch.Tensor, counts: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Where the groups of `slots` (K,) start, (B, K), when `counts` (B, 1) candidates are cut into `used` groups."""
    return (slots * counts).div(used.clamp(min=1), rounding_mode="floor")


def _share(used: torch.Tensor, counts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (used / counts.clamp(min=1)).squeeze(-1).to(like.dtype)
