"""Selection of targets against numbers worked out by hand."""

import math

import pytest
import torch

from ilvr.trainer.selection import (
    SELECTORS,
    Queries,
    Selection,
    SelectionInputs,
    SpanSelection,
    fill_slots,
    global_query,
    group_candidates,
    masked_mean,
    span_text_masks,
    top_p_selection,
)


ALL = {"dtype": torch.bool}


def test_masked_mean():
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    assert masked_mean(values, torch.tensor([[True, True, False]])).tolist() == [[2.0, 3.0]]
    assert masked_mean(values, torch.tensor([[False, False, False]])).tolist() == [[0.0, 0.0]]


def test_group_candidates_averages_contiguous_groups():
    features = torch.arange(5.0).unsqueeze(1)
    assert group_candidates(features, 2).squeeze(1).tolist() == [1.0, 3.5]  # {0, 1, 2} and {3, 4}
    assert group_candidates(features, 5) is features


def test_global_query_by_hand():
    """Prompt state h_p = (2, 0); image states (1, 0) and (0, 1); D = 2, so the scores are 2 / sqrt(2) and 0."""
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [7.0, 7.0]]])
    image = torch.tensor([[True, True, False, False]])
    prompt = torch.tensor([[False, False, True, False]])
    weight = math.exp(2 / math.sqrt(2)) / (math.exp(2 / math.sqrt(2)) + 1)
    expected = [(weight + 2) / 2, (1 - weight) / 2]
    assert global_query(hidden, prompt, image)[0].tolist() == pytest.approx(expected)
    assert global_query(hidden, prompt, torch.zeros_like(image))[0].tolist() == [2.0, 0.0]


def test_span_text_masks():
    start, pad, end = 5, 6, 7
    ids = torch.tensor([[1, 2, 3, start, pad, end, 4, start, pad, end, 2]])
    assistant = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]], **ALL)
    masks = span_text_masks(ids, assistant, (start, pad, end), 2)
    assert masks[0, 0].nonzero().flatten().tolist() == [1, 2]
    assert masks[0, 1].nonzero().flatten().tolist() == [6]


def test_top_p_by_hand():
    """Probabilities 0.6, 0.3, 0.1: two of them hold 0.9, three more than 0.95."""
    scores = torch.tensor([0.3, 0.1, 0.6]).log().unsqueeze(0)
    exists = torch.ones(1, 3, **ALL)
    indices, selected, mass = top_p_selection(scores, exists, top_p=0.85, max_selected=3, temperature=1.0)
    assert indices[0].tolist() == [2, 0, 1] and selected[0].tolist() == [True, True, False]
    assert mass.item() == pytest.approx(0.9)
    _, selected, _ = top_p_selection(scores, exists, top_p=0.95, max_selected=3, temperature=1.0)
    assert selected.sum() == 3
    _, selected, mass = top_p_selection(scores, exists, top_p=0.95, max_selected=2, temperature=1.0)
    assert selected.sum() == 2 and mass.item() == pytest.approx(0.9)


def test_top_p_with_few_or_no_candidates():
    scores = torch.zeros(2, 3)
    exists = torch.tensor([[True, False, False], [False, False, False]])
    indices, selected, mass = top_p_selection(scores, exists, top_p=0.9, max_selected=5, temperature=1.0)
    assert selected.tolist() == [[True] + [False] * 4, [False] * 5]
    assert indices[0, 0] == 0 and mass.tolist() == [1.0, 0.0]


def test_temperature_one_never_binds():
    """The paper's preset: cosines lie in [-1, 1], so 8 of 15 candidates hold less than 0.9 and all 8 are kept."""
    scores = torch.linspace(-1, 1, 15).unsqueeze(0)
    exists = torch.ones(1, 15, **ALL)
    _, selected, mass = top_p_selection(scores, exists, top_p=0.9, max_selected=8, temperature=1.0)
    assert selected.sum() == 8 and mass.item() < 0.9
    _, selected, _ = top_p_selection(scores, exists, top_p=0.9, max_selected=8, temperature=0.1)
    assert selected.sum() == 2  # probabilities fall by exp(-(1 / 7) / 0.1) = 0.24 a step: 0.76 + 0.18 are enough


def select(method, candidates, exists, max_selected, **options):
    """Targets, masks, indices and masses of all spans, as the trainer's selector chains them."""
    inputs = SelectionInputs(candidates, exists, max_selected, **options)
    spans = []
    for span in range(candidates.shape[1]):
        spans.append(SELECTORS[method].select(inputs, span, spans[-1] if spans else None))
    return [torch.stack(parts, dim=1) for parts in zip(*spans)]


def test_queries_chain_through_the_spans():
    """Span 0 asks for (1, 0) and gets it; span 1 has no words, so u and that feature make its query."""
    candidates = torch.eye(2).expand(1, 2, 2, 2)
    words = torch.tensor([[[1.0, 0.0], [0.0, 50.0]]])
    queries = Queries(torch.tensor([[0.0, 0.4]]), words, torch.tensor([[True, False]]))
    exists = torch.ones(1, 2, 2, **ALL)
    targets, mask, indices, mass = select("query_top_p", candidates, exists, 1, temperature=1.0, queries=queries)
    # q_0 = ((0, .4) + (1, 0)) / 2 = (.5, .2); q_1 = ((0, .4) + (1, 0)) / 2: the words of span 1 are not there.
    assert indices.flatten().tolist() == [0, 0] and mask.all()
    assert targets[0, :, 0].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    cosines = torch.tensor([0.5, 0.2]) / math.hypot(0.5, 0.2)
    assert mass[0, 0].item() == pytest.approx(cosines.softmax(0)[0].item())


def test_a_missing_span_selects_nothing_and_is_no_previous_one():
    candidates = torch.eye(2).expand(1, 2, 2, 2)
    exists = torch.tensor([[[False, False], [True, True]]])
    queries = Queries(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2, 2), torch.zeros(1, 2, **ALL))
    _, mask, indices, _ = select("query_top_p", candidates, exists, 1, temperature=1.0, queries=queries)
    assert mask.flatten().tolist() == [False, True] and indices[0, 1, 0] == 1


def test_baselines():
    candidates = torch.arange(6.0).view(1, 1, 6, 1)
    exists = torch.ones(1, 1, 6, **ALL)
    pooled, mask, _, mass = select("mean_pool", candidates, exists, 3)
    assert pooled.flatten().tolist() == [0.5, 2.5, 4.5] and mask.all() and mass.item() == 0.5
    uniform, _, indices, _ = select("uniform", candidates, exists, 3)
    assert indices.flatten().tolist() == [0, 2, 4] and uniform.flatten().tolist() == [0.0, 2.0, 4.0]
    _, mask, indices, _ = select("random", candidates, exists, 4)
    assert len(set(indices.flatten().tolist())) == 4 and mask.all()
    for method in ("mean_pool", "uniform", "random"):
        targets, mask, _, _ = select(method, candidates, exists, 8)
        assert mask.sum() == 6 and sorted(targets[mask].flatten().tolist()) == [0, 1, 2, 3, 4, 5]


def test_what_changed_since_the_picture_before():
    """The user's image, then two boards: candidate 2 moves by 4 and candidate 0 by 1, then candidate 1 by 3."""
    user = torch.tensor([[[0.0], [1.0], [2.0]]])
    first, second = torch.tensor([[[1.0], [1.0], [6.0]]]), torch.tensor([[[1.0], [4.0], [6.0]]])
    candidates, exists = torch.stack([first, second], 1), torch.ones(1, 2, 3, **ALL)
    options = {"temperature": 0.1, "top_p": 0.9, "encode_user_pictures": lambda: (user, torch.ones(1, 3, **ALL))}
    targets, mask, indices, mass = select("change", candidates, exists, 2, **options)
    assert indices[0, :, 0].tolist() == [2, 1] and mask.tolist() == [[[True, False], [True, False]]]
    assert targets[0, :, 0, 0].tolist() == [6.0, 4.0]
    scores = torch.tensor([0.25, 0.0, 1.0]) / 0.1
    assert mass[0, 0].item() == pytest.approx(scores.softmax(0)[2].item())
    options["encode_user_pictures"] = lambda: (user[:, :2], torch.ones(1, 2, **ALL))
    with pytest.raises(ValueError, match="Helper image 0 of row 0 has 3 candidates, the one before 2"):
        select("change", candidates, exists, 2, **options)


def test_baselines_of_pictures_of_unequal_size():
    """Two and six candidates in one batch: each picture is cut by its own number."""
    candidates = torch.arange(6.0).view(1, 6, 1).expand(2, 1, 6, 1)
    exists = torch.tensor([[[True] * 2 + [False] * 4], [[True] * 6]])
    pooled, mask, _, mass = select("mean_pool", candidates, exists, 3)
    assert mask.tolist() == [[[True, True, False]], [[True] * 3]] and mass.flatten().tolist() == [1.0, 0.5]
    assert pooled.flatten().tolist() == [0.0, 1.0, 0.0, 0.5, 2.5, 4.5]


def make_selection() -> Selection:
    """Spans with K* = 2 and 1 in the first sample, K* = 2 in the second, whose second span does not exist."""
    candidates = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]).expand(2, 2, 3, 2)
    candidate_mask = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [0, 0, 0]]], dtype=torch.bool)
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [0, 0]]], dtype=torch.bool)
    indices = torch.tensor([[[2, 0], [1, 0]], [[0, 1], [0, 0]]])
    targets = candidates.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, 2)) * mask.unsqueeze(-1)
    mass = torch.tensor([[0.5, 0.9], [1.0, 0.0]])
    return Selection(targets, mask, indices, mass, candidates, candidate_mask)


def test_statistics_of_a_selection_by_hand():
    found = {name: value.item() for name, value in make_selection().statistics().items()}
    expected = {"selected_per_span": 5 / 3, "selected_mass": 0.8, "selected_1": 1 / 3, "selected_2": 2 / 3}
    assert found == pytest.approx(expected)


def test_slots_behind_the_last_target_repeat_it():
    targets = torch.tensor([[[1.0], [2.0], [0.0]], [[3.0], [0.0], [0.0]], [[0.0], [0.0], [0.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], **ALL)
    indices = torch.tensor([[4, 7, 1], [5, 2, 2], [0, 0, 0]])
    filled = fill_slots(SpanSelection(targets, mask, indices, torch.ones(3)))
    assert filled.targets.squeeze(-1).tolist() == [[1, 2, 2], [3, 3, 3], [0, 0, 0]]
    assert filled.mask.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    assert filled.indices[:2].tolist() == [[4, 7, 7], [5, 5, 5]]


def test_statistics_count_a_repeated_target_once():
    selection = make_selection()
    expected = {name: value.item() for name, value in selection.statistics().items()}
    spans = [
        SpanSelection(selection.targets[:, s], selection.mask[:, s], selection.indices[:, s], selection.mass[:, s])
        for s in (0, 1)
    ]
    filled = [torch.stack(parts, 1) for parts in zip(*map(fill_slots, spans))]
    repeated = Selection(*filled, selection.candidates, selection.candidate_mask)
    assert repeated.mask.sum() > selection.mask.sum()
    assert {name: value.item() for name, value in repeated.statistics().items()} == pytest.approx(expected)


def test_answer_gradient_by_hand():
    """Relevances 6, 3 and 1: shares 0.6, 0.3 and 0.1; a candidate that does not exist is not taken."""
    candidates = torch.arange(4.0).view(1, 1, 4, 1)
    exists = torch.tensor([[[True, True, True, False]]])
    relevance = torch.tensor([[[1.0, 6.0, 3.0, 99.0]]])
    targets, mask, indices, mass = select("answer_gradient", candidates, exists, 3, top_p=0.8, relevance=relevance)
    assert indices[0, 0, :2].tolist() == [1, 2] and mask.tolist() == [[[True, True, False]]]
    assert targets.flatten().tolist() == [1.0, 2.0, 0.0] and mass.item() == pytest.approx(0.9)
    nothing = torch.zeros_like(relevance)
    _, mask, _, mass = select("answer_gradient", candidates, exists, 1, top_p=0.8, relevance=nothing)
    assert mask.all() and mass.item() == pytest.approx(1 / 3)


def test_nearest_candidate_by_hand():
    """By cosine: neither a longer candidate nor one that does not exist wins."""
    latents = torch.tensor([[[3.0, 1.0], [-9.0, 1.0]]]).expand(2, 2, 2, 2)
    selection = make_selection()
    nearest = selection.nearest(latents)
    assert nearest[0].tolist() == [[0, 2], [0, 1]] and nearest[1, 0].tolist() == [0, 2]
    selection.candidates = selection.candidates * torch.tensor([1.0, 9.0, 1.0]).view(3, 1)
    assert selection.nearest(latents).equal(nearest)
