"""What the teacher looks for in a helper image, and which image features it keeps (paper, section 3.2).

Pure functions. Shapes: B batch, T sequence, S spans, K latents a span, N candidates of a helper image, D hidden.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


SELECTION_METHODS = ("query_top_p", "mean_pool", "uniform", "random")


@dataclass
class Selection:
    """What was selected in the helper images of a batch.

    Args:
        targets (`torch.Tensor` of shape `(B, S, K, D)`): by falling score, zero where `mask` is false.
        mask (`torch.BoolTensor` of shape `(B, S, K)`): the first K* of each span.
        indices (`torch.LongTensor` of shape `(B, S, K)`): of the targets among the candidates.
        mass (`torch.Tensor` of shape `(B, S)`): probability that the targets hold.
        candidates (`torch.Tensor` of shape `(B, S, N, D)`): features of the helper images.
        candidate_mask (`torch.BoolTensor` of shape `(B, S, N)`): which candidates exist; none in a span that does not.
    """

    targets: torch.Tensor
    mask: torch.Tensor
    indices: torch.Tensor
    mass: torch.Tensor
    candidates: torch.Tensor
    candidate_mask: torch.Tensor

    def statistics(self) -> dict[str, torch.Tensor]:
        """Means over the spans: K*, the share of spans with each K* from 1 to K, and the selected mass."""
        exists = self.mask.any(-1)  # (B, S)
        counts = self.mask.sum(-1)[exists]  # (spans,)
        shares = {f"selected_{k}": (counts == k).float().mean() for k in range(1, self.mask.shape[-1] + 1)}
        return {"selected_per_span": counts.float().mean(), "selected_mass": self.mass[exists].mean(), **shares}

    def nearest(self, latents):
        """The candidate (B, S, K) that each of `latents` (B, S, K, D) resembles most, by cosine as in the loss."""
        unit = torch.nn.functional.normalize(self.candidates, dim=-1)
        scores = torch.einsum("bskd,bsnd->bskn", latents.to(unit.dtype), unit)
        return scores.masked_fill(~self.candidate_mask.unsqueeze(2), -torch.inf).argmax(-1)


def masked_mean(values, mask):
    """Mean of `values` (…, T, D) over the columns where `mask` (…, T) is true; zero where there are none."""
    weights = mask.to(values.dtype)
    total = torch.einsum("...td,...t->...d", values, weights)
    return total / weights.sum(-1, keepdim=True).clamp(min=1)


def group_candidates(features, max_candidates):
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


def pad_candidates(groups, counts):
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


def global_query(hidden, prompt_mask, image_mask):
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


def span_text_masks(input_ids, assistant_mask, latent_ids, num_spans):
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


def top_p_selection(scores, candidate_mask, *, top_p, max_selected, temperature):
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
        indices = torch.nn.functional.pad(indices, (0, missing))
        selected = torch.nn.functional.pad(selected, (0, missing))
    return indices, selected, kept_mass


def select_by_query(
    candidates, candidate_mask, global_queries, text_queries, has_text, *, top_p, max_selected, temperature
):
    """Selects the targets of each span by the teacher's query (paper, equations 3 to 6).

    q_s is the mean of u, of the mean state of the words before span s (if there are any), and of the mean of the
    features selected for span s - 1 (if there is one).

    Args:
        candidates (`torch.Tensor` of shape `(B, S, N, D)`): features of the helper images.
        candidate_mask (`torch.BoolTensor` of shape `(B, S, N)`).
        global_queries (`torch.Tensor` of shape `(B, D)`): u.
        text_queries (`torch.Tensor` of shape `(B, S, D)`): mean states of the words before each span.
        has_text (`torch.BoolTensor` of shape `(B, S)`): whether there are such words.

    Returns:
        `tuple`: targets (B, S, K, D) by falling score, mask (B, S, K), indices (B, S, K), selected mass (B, S).
    """
    targets, masks, all_indices, masses = [], [], [], []
    previous = torch.zeros_like(global_queries)
    has_previous = torch.zeros_like(has_text[:, 0])
    for s in range(candidates.shape[1]):
        weights = torch.stack([torch.ones_like(has_previous), has_text[:, s], has_previous], 1).to(candidates.dtype)
        parts = torch.stack([global_queries, text_queries[:, s], previous], 1)  # (B, 3, D)
        query = (parts * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)  # (B, D)
        scores = torch.cosine_similarity(candidates[:, s], query.unsqueeze(1), dim=-1)  # (B, N)
        indices, mask, mass = top_p_selection(
            scores, candidate_mask[:, s], top_p=top_p, max_selected=max_selected, temperature=temperature
        )
        chosen = candidates[:, s].gather(1, indices.unsqueeze(-1).expand(-1, -1, candidates.shape[-1]))  # (B, K, D)
        previous, has_previous = masked_mean(chosen, mask), mask.any(1)
        targets.append(chosen * mask.unsqueeze(-1))
        masks.append(mask)
        all_indices.append(indices)
        masses.append(mass)
    return torch.stack(targets, 1), torch.stack(masks, 1), torch.stack(all_indices, 1), torch.stack(masses, 1)


def select_without_query(candidates, candidate_mask, *, method, max_selected):
    """Baselines for ablations: targets that no teacher chose.

    Args:
        candidates (`torch.Tensor` of shape `(B, S, N, D)`), candidate_mask (`torch.BoolTensor` of shape `(B, S, N)`).
        method (`str`): `"mean_pool"` (K contiguous groups, averaged, as in Mirage), `"uniform"` (K at equal distances
            in raster order) or `"random"` (K drawn without replacement).

    Returns:
        As [`select_by_query`]; the mass is the share of the candidates that are used.
    """
    batch_size, num_spans, num_candidates, _ = candidates.shape
    counts = candidate_mask.sum(-1, keepdim=True)  # (B, S, 1)
    slots = torch.arange(max_selected, device=candidates.device)
    used = torch.minimum(counts, torch.as_tensor(max_selected, device=counts.device))
    mask = slots < used  # (B, S, K)
    if method == "random":
        noise = torch.rand(candidate_mask.shape, device=candidates.device).masked_fill(~candidate_mask, -1.0)
        indices = noise.argsort(-1, descending=True)
        indices = torch.nn.functional.pad(indices, (0, max(0, max_selected - num_candidates)))[..., :max_selected]
    else:
        indices = (slots * counts).div(used.clamp(min=1), rounding_mode="floor").clamp(max=num_candidates - 1)
    targets = candidates.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, candidates.shape[-1]))
    if method == "mean_pool":
        ends = ((slots + 1) * counts).div(used.clamp(min=1), rounding_mode="floor")  # (B, S, K)
        places = torch.arange(num_candidates, device=candidates.device)
        groups = (places >= indices.unsqueeze(-1)) & (places < ends.unsqueeze(-1))  # (B, S, K, N)
        groups = groups & candidate_mask.unsqueeze(2)
        targets = masked_mean(candidates.unsqueeze(2), groups)
    mass = (used / counts.clamp(min=1)).squeeze(-1).to(candidates.dtype)
    return targets * mask.unsqueeze(-1), mask, indices * mask, mass
