"""The selector that trainer, pictures and audits ask."""

import copy

import pytest
import torch
from helpers import SAMPLES, make_trainer

from ilvr.trainer import ILVRTrainingConfig
from ilvr.trainer.selection import SELECTORS, Selector, select_uniform
from ilvr.trainer.watching.selection_drawing import compare_latents


def selected(model, processor, folder, method):
    torch.manual_seed(0)
    trainer = make_trainer(copy.deepcopy(model), processor, folder, selection_method=method)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    return compare_latents(trainer, batch)[0]


def test_each_method_selects_targets_of_its_own(model, processor, tmp_path):
    """K = 3 of 4 candidates: the baselines always take three."""
    found = {method: selected(model, processor, tmp_path, method) for method in SELECTORS}
    for method, selection in found.items():
        for other in found:
            assert method == other or not selection.targets.equal(found[other].targets), (method, other)
        if method in ("mean_pool", "uniform", "random"):
            assert selection.mask.equal(selection.candidate_mask.any(-1, keepdim=True).expand_as(selection.mask))
    assert found["mean_pool"].candidates.equal(found["random"].candidates)


def test_a_name_that_is_no_method_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`selection_method` must be one of .*'uniform'.* got 'unifrom'"):
        ILVRTrainingConfig(str(tmp_path), selection_method="unifrom", use_cpu=True, bf16=False)


def test_a_new_selector_is_a_function_and_a_line(model, processor, tmp_path, monkeypatch):
    """It sees the picture before: the user's image at first, then the helper image of the span before."""
    seen = []

    def select_changed(inputs, span, previous):
        before, mask = inputs.picture_before(span)
        seen.append((span, before, mask, previous))
        return select_uniform(inputs, span)

    monkeypatch.setitem(SELECTORS, "changed", Selector(select_changed))
    selection = selected(model, processor, tmp_path, "changed")
    assert [span for span, *_ in seen] == list(range(selection.mask.shape[1]))
    assert seen[0][3] is None and seen[1][3].targets.equal(selection.targets[:, 0])
    assert seen[1][1].equal(selection.candidates[:, 0])
    # All samples show the same picture to the user; 2 x 2 tokens.
    first, mask = seen[0][1:3]
    assert mask.all() and first.shape == (4, 4, 32) and first[0].equal(first[3])
    image = processor.image_processor([SAMPLES[0]["images"][0]], return_tensors="pt")
    expected = model.get_image_features(**image, return_dict=True).pooler_output[0]
    torch.testing.assert_close(first[0], expected)


def test_baselines_take_no_forward_of_the_teacher(model, processor, tmp_path):
    calls = []
    for method in SELECTORS:
        trainer = make_trainer(copy.deepcopy(model), processor, tmp_path, selection_method=method, max_steps=1)
        trainer.teacher.model.register_forward_hook(lambda *_, method=method: calls.append(method))
        trainer.train()
    assert calls == ["query_top_p"]
