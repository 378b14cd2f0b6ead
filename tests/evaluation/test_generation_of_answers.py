"""Metric, answers and pictures."""

from statistics import NormalDist

import pytest
from PIL import Image

from ilvr.evaluation import draw_latents, generate_answers, load_metric
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


def test_unknown_metric():
    with pytest.raises(ValueError, match="no metric 'chess'; choose one of \\['frozen_lake'\\]"):
        load_metric("chess")


def test_answers_do_not_depend_on_the_batch(model, processor):
    data = frozen_lake_dataset({3: 2, 4: 3}, tasks=["plan"], split="test")
    together = generate_answers(model, processor, data, batch_size=5, max_new_tokens=6)
    assert together == generate_answers(model, processor, data, batch_size=2, max_new_tokens=6)
    assert len(together) == 5


def test_picture(model, processor, tmp_path):
    data = frozen_lake_dataset({3: 2}, tasks=["plan_trace"], split="test")
    draw_latents(model, processor, data, tmp_path / "latents.png", max_spans=2, max_new_tokens=12)
    assert Image.open(tmp_path / "latents.png").width > 200
