"""Pictures, during training, of what is selected."""

import copy

import pytest
import torch
from helpers import (
    SAMPLES,
    SPEED,
    make_dataset,
    make_sample,
    make_trainer,
    outlined,
    run_with_pictures,
)
from PIL import Image

from ilvr.trainer import SelectionDrawingCallback
from ilvr.trainer.watching.selection_drawing import compare_latents
from ilvr.trainer.watching.selection_pictures import (
    STUDENT_COLOR,
    TEACHER_COLOR,
)


ASKED = {"selection_method": "answer_gradient", "helper_question": "Right", "max_helper_answer_tokens": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_images": True},
        {"selection_method": "random"},
        ASKED,
        {**ASKED, "selection_schedule": "once"},
        {"stage": 2, "alignment_weight": 1.0},
    ],
    ids=str,
)
def test_pictures_do_not_disturb_training(model, processor, tmp_path, settings):
    """Noise on the targets and dropout draw random numbers in each step; all that is logged stays the same."""
    settings = {"alignment_noise": 0.1, "max_steps": 3, **settings}
    for layer in model.vlm.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    other = copy.deepcopy(model)
    plain = run_with_pictures(model, processor, tmp_path / "a", every=0, **settings).state.log_history
    drawn = run_with_pictures(other, processor, tmp_path / "b", every=1, **settings).state.log_history
    for a, b in zip(plain[:3], drawn[:3], strict=True):
        assert a.keys() == b.keys() and all(a[name] == b[name] for name in a.keys() - SPEED)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    names = [f"step-00000{n}.png" for n in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "b" / "selections").iterdir()) == names


@pytest.mark.parametrize("max_candidates", [256, 3])
def test_picture_shows_what_was_selected(model, processor, tmp_path, max_candidates):
    """The outlines in the saved file against the selection itself; boards of 2 x 2 cells, single or grouped."""
    settings = {"max_steps": 2, "cache_images": True, "max_candidates": max_candidates}
    trainer = run_with_pictures(model, processor, tmp_path, **settings)
    assert [path.name for path in (tmp_path / "selections").iterdir()] == ["step-000002.png"]
    picture = Image.open(tmp_path / "selections" / "step-000002.png")
    callback = trainer.callback_handler.callbacks[-1]
    selection, latents = compare_latents(trainer, callback.batch)
    nearest = selection.nearest(latents)
    spans = selection.mask.any(-1).nonzero().tolist()
    assert spans == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]  # samples with two and with three spans
    cells = [range(4)] if max_candidates == 256 else [[0, 1], [2], [3]]
    cells = [[n] for n in range(4)] if max_candidates == 256 else cells
    for row, (b, s) in enumerate(spans):
        top = 18 + 8 + row * (18 + 256 + 8) + 18
        mask = selection.mask[b, s]
        for column, chosen, color in ((1, selection.indices, TEACHER_COLOR), (2, nearest, STUDENT_COLOR)):
            left = 8 + column * (256 + 8)
            panel = picture.crop((left, top, left + 256, top + 256))
            expected = {cell for n in chosen[b, s, mask].tolist() for cell in cells[n]}
            if max_candidates == 256:
                assert set(outlined(panel, (2, 2), color)) == expected
            else:  # cells of a group have a frame around both: its upper edge is above each of them
                above = {n for n in range(4) if panel.getpixel((64 + 128 * (n % 2), 128 * (n // 2) + 1)) == color}
                assert above == expected


@pytest.mark.parametrize("settings", [{"stage": 2}, {"selection_method": "mean_pool"}], ids=str)
def test_nothing_to_draw_is_refused(model, processor, tmp_path, settings):
    trainer = make_trainer(model, processor, tmp_path, **settings)
    with pytest.raises(ValueError, match="selection_method"):
        SelectionDrawingCallback(trainer, make_dataset(SAMPLES[:1]))


@pytest.mark.parametrize("backbone_name", ["gemma3"], indirect=True)
def test_backbones_without_a_grid_are_drawn_by_the_shape_of_the_image(model, processor, tmp_path):
    run_with_pictures(model, processor, tmp_path, max_steps=1, every=1)
    assert (tmp_path / "selections" / "step-000001.png").exists()


@pytest.mark.parametrize("backbone_name", ["smolvlm"], indirect=True)
def test_tiles_are_refused(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path)
    with pytest.raises(ValueError, match="cuts the 1 helper images into 5 tiles"):
        SelectionDrawingCallback(trainer, make_dataset([make_sample(["Up", "Down"], size=64)]))


def test_arguments_of_the_callback_are_checked(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, cache_images=True)
    with pytest.raises(ValueError, match="`every` must be at least 1 optimizer step, got 0"):
        SelectionDrawingCallback(trainer, make_dataset(SAMPLES[:1]), every=0)
    with pytest.raises(ValueError, match="features, not images"):
        SelectionDrawingCallback(trainer, trainer.train_dataset.select([0]))
