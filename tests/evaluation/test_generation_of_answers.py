"""Metric, answers and pictures."""

import json
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
import torch
from helpers import make_sample
from matplotlib.axes import Axes
from PIL import Image

from ilvr.data import load_conversations, prompt_of
from ilvr.evaluation import (
    draw_curves,
    draw_latents,
    generate_answers,
    load_metric,
    patch_similarity,
    score_table,
    scores_by_group,
)
from ilvr.evaluation.metrics import METRICS
from ilvr.tasks import load_task
from ilvr.tasks.frozen_lake import frozen_lake_dataset


BOARD = ["SFF", "HFF", "FFG"]


@pytest.fixture(scope="module")
def metric():
    return load_metric("frozen_lake")


@pytest.mark.parametrize(
    "answer, end_on_goal, first_hit, invalid",
    [
        ("\\boxed{R R D D}", 1, 1, 0),
        ("\\boxed{R,R,D,D}", 1, 1, 0),
        ("so \\boxed{D} or rather \\boxed{RRDD}.", 1, 1, 0),  # the last box counts
        ("\\boxed{R R D D L}", 0, 1, 0),  # runs over the goal
        ("\\boxed{R R D D R}", 1, 1, 0),  # off the board = stays on the goal
        ("\\boxed{D}", 0, 0, 0),  # hole
        ("\\boxed{R R D D L L L U}", 0, 1, 0),  # goal first, hole later
        ("\\boxed{}", 0, 0, 0),
        ("R R D D", 0, 0, 1),  # no box
        ("\\boxed{R R X D D}", 0, 0, 1),  # an illegal letter is not dropped
        ("\\boxed{r r d d}", 0, 0, 1),
    ],
)
def test_rules(metric, answer, end_on_goal, first_hit, invalid):
    result = metric.compute(predictions=[answer], references=[BOARD])
    assert (result["end_on_goal"], result["first_hit"], result["invalid"]) == (end_on_goal, first_hit, invalid)


def test_sizes_and_intervals(metric):
    large = ["SF", "FG"]
    answers = ["\\boxed{RRDD}"] * 3 + ["\\boxed{L}"] + ["\\boxed{RD}"] * 2
    result = metric.compute(predictions=answers, references=[BOARD] * 4 + [large] * 2)
    assert result["count"] == 6 and result["count_3x3"] == 4 and result["count_2x2"] == 2
    assert result["end_on_goal"] == pytest.approx(5 / 6)
    assert result["end_on_goal_3x3"] == 0.75 and result["end_on_goal_2x2"] == 1.0
    # Wilson: the rates at which 3 of 4 is z standard errors away.
    z = NormalDist().inv_cdf(0.975)
    for bound in (result["end_on_goal_low_3x3"], result["end_on_goal_high_3x3"]):
        assert abs(0.75 - bound) == pytest.approx(z * (bound * (1 - bound) / 4) ** 0.5, rel=1e-4)
    assert result["end_on_goal_high_2x2"] == pytest.approx(1.0)


def test_a_metric_of_ones_own_is_a_file(tmp_path):
    own = tmp_path / "own.py"
    lenient = METRICS["boxed_exact_match"].read_text().replace("box.split() == reference.split()", "True")
    own.write_text(lenient)
    assert load_metric(str(own)).compute(predictions=["\\boxed{a}"], references=["b"])["accuracy"] == 1
    with pytest.raises(ValueError, match="no metric .*none.py"):
        load_metric(str(tmp_path / "none.py"))


def test_unknown_metric():
    known = "\\['boxed_exact_match', 'frozen_lake', 'glyphs', 'multiple_choice'\\]"
    with pytest.raises(ValueError, match=f"no metric 'chess'; choose one of {known}"):
        load_metric("chess")


def test_answers_do_not_depend_on_the_batch(model, processor):
    data = frozen_lake_dataset({3: 2, 4: 3}, tasks=["plan"], split="test")
    together = generate_answers(model, processor, data, batch_size=5, max_new_tokens=6)
    assert together == generate_answers(model, processor, data, batch_size=2, max_new_tokens=6)
    assert len(together) == 5


def test_questions_of_any_source(model, processor, image_root, tmp_path):
    """Images that are not decoded, a system turn before the question, several images in it."""
    row = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief"}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Plan"}, {"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Up"}, {"type": "image"}]},
        ],
        "images": ["board.png", "step 1.png", "board.png"],
        "answer": "Up",
    }
    (image_root / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = load_conversations(str(image_root / "rows.jsonl"))
    system, user = prompt_of(data[0])
    assert (system["role"], user["role"]) == ("system", "user")
    assert [part["type"] for part in user["content"]] == ["image", "text", "image"]
    for part, name in zip(user["content"][::2], ("board.png", "step 1.png")):
        assert np.array_equal(part["image"], Image.open(image_root / name).convert("RGB"))
    assert len(generate_answers(model, processor, data, max_new_tokens=4)) == 1


def test_boxed_exact_match():
    answers = ["so \\boxed{1} or \\boxed{ 7 }", "\\boxed{\\frac{1}{2}}", "7", "\\boxed{A  b}", "\\boxed{a}"]
    references = ["7", "\\frac{1}{2}", "7", "A b", "A"]
    result = load_metric("boxed_exact_match").compute(predictions=answers, references=references)
    assert (result["accuracy"], result["invalid"], result["count"]) == (0.6, 0.2, 5)
    assert 0.2 < result["accuracy_low"] < 0.6 < result["accuracy_high"] < 0.9


def test_scores_and_their_table(metric):
    answers, boards = ["\\boxed{RRDD}", "\\boxed{L}", "R D"], [BOARD, BOARD, ["SF", "FG"]]
    lake = metric.compute(predictions=answers, references=boards)
    scores = scores_by_group(lake)
    assert list(scores) == ["", "2x2", "3x3"] and (scores["3x3"].value, scores["3x3"].count) == (0.5, 2)
    head, _, row = score_table({"model": lake}).splitlines()
    assert head == "| model | 2x2 | 3x3 | invalid |"
    assert row == f"| model | {scores['2x2']} | 50.0 % (9.5 – 90.5) | 33.3 % |"
    boxed = load_metric("boxed_exact_match").compute(predictions=["\\boxed{7}"], references=["7"])
    assert score_table({"m": boxed}).startswith("| model | accuracy | invalid |")
    with pytest.raises(ValueError, match="no f1_low and f1_high"):
        scores_by_group({"f1": 0.5, "count": 3})


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: titles, shadings (arrays with a colour map) and numbers with their places."""
    found = {"titles": [], "shadings": [], "numbers": []}
    set_title, imshow, text = Axes.set_title, Axes.imshow, Axes.text

    def record_imshow(axis, image, **kwargs):
        if "cmap" in kwargs:
            found["shadings"].append(np.asarray(image))
        return imshow(axis, image, **kwargs)

    def record_text(axis, x, y, words, **kwargs):
        found["numbers"].append((words, x, y))
        return text(axis, x, y, words, **kwargs)

    monkeypatch.setattr(Axes, "set_title", lambda axis, t, **k: found["titles"].append(t) or set_title(axis, t, **k))
    monkeypatch.setattr(Axes, "imshow", record_imshow)
    monkeypatch.setattr(Axes, "text", record_text)
    return found


def test_picture_of_a_board_after_each_move(model, processor, tmp_path, monkeypatch, drawn):
    task = load_task("frozen_lake", maps={3: 1}, test_maps={3: 2})
    answer, latents = "R D \\boxed{R D}", torch.randn(3, 3, 32)
    monkeypatch.setattr("ilvr.evaluation.pictures.answer_with_latents", lambda *args, **kwargs: (answer, latents))
    data = task.dataset("test")
    draw_latents(
        *(model, processor, data, tmp_path / "latents.png"), draw=task.draw, is_right=lambda *_: True, max_spans=2
    )
    assert drawn["titles"] == ["R D  right", "after R", "after D"] * 2
    assert [number for number, *_ in drawn["numbers"]] == ["1", "2", "3"] * 4 and len(drawn["shadings"]) == 4
    with Image.open(tmp_path / "latents.png") as picture:
        assert picture.width > picture.height


def test_similarity_of_latents_and_the_patches_of_an_oblong_image(model, processor, tmp_path, monkeypatch, drawn):
    """A latent that is the feature of a patch resembles that patch most, wherever it is, and so it is drawn."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8))
    inputs = processor.image_processor([image], return_tensors="pt")
    features = model.get_image_features(**inputs, return_dict=True).pooler_output[0]  # 2 x 4 tokens of 16 pixels
    latents = features[[1, 6]].detach()
    found = patch_similarity(model, processor, image, latents)
    assert found.shape == (2, 2, 4)
    assert [np.unravel_index(scores.argmax(), (2, 4)) for scores in found] == [(0, 1), (1, 2)]
    sample = make_sample(["x"]) | {"images": [image]}
    pictures = []
    for own in (latents, latents.flip(0)):
        given = ("\\boxed{x}", own.unsqueeze(0))
        monkeypatch.setattr("ilvr.evaluation.pictures.answer_with_latents", lambda *args, given=given, **kwargs: given)
        draw_latents(model, processor, [sample], tmp_path / "latents.png")
        pictures.append(np.asarray(Image.open(tmp_path / "latents.png")))
    assert drawn["titles"] == ["x", "span 1"] * 2
    for shading in drawn["shadings"]:
        assert shading.shape == (2, 4) and {(0, 1), (1, 2)} == {tuple(cell) for cell in np.argwhere(shading > 0.999)}
    columns_and_rows = [(words, int(x // 16), int(y // 16)) for words, x, y in drawn["numbers"]]
    assert columns_and_rows == [("1", 1, 0), ("2", 2, 1), ("1", 2, 1), ("2", 1, 0)]
    assert (pictures[0] != pictures[1]).any()


def test_curves_of_runs_one_after_another(tmp_path, monkeypatch):
    drawn = {}
    semilogy = Axes.semilogy
    monkeypatch.setattr(
        Axes, "semilogy", lambda axis, x, y, **k: drawn.update({k["label"]: x}) or semilogy(axis, x, y, **k)
    )
    for name, steps in (("one", 3), ("two", 2)):
        log = [{"step": step, "ce_loss": 1.0 / step} for step in range(1, steps + 1)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"global_step": steps, "log_history": log}))
    draw_curves({name: tmp_path / f"{name}.json" for name in ("one", "two")}, tmp_path / "curves.png")
    assert drawn == {"one": (1, 2, 3), "two": (4, 5)}
    assert Image.open(tmp_path / "curves.png").width > 500


def test_the_import_leaves_matplotlib_as_it_is():
    """A notebook's own plots go on as before."""
    script = """
import matplotlib, sys
matplotlib.rcParams["backend"] = "svg"
import ilvr.evaluation
assert matplotlib.rcParams["backend"] == "svg" and "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
