r"""Rewards: by a task's metric, by form, by use of latents; and the prompts that they are given for."""

import math

import pytest
import torch
from helpers import SAMPLES, make_dataset, make_sample

from ilvr.tasks import load_task
from ilvr.trainer import make_prompts
from ilvr.trainer.rewards import accuracy_reward, format_reward, latent_contrast_reward, span_reward


def say(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_accuracy_is_that_of_the_metric():
    reward = accuracy_reward("boxed_exact_match")
    found = reward(completions=say("\\boxed{R}", " so \\boxed{D}", "R"), reference=["R", "R", "R"], trainer_state=None)
    assert found == [1.0, 0.0, 0.0] and reward.__name__ == "accuracy"
    with pytest.raises(ValueError, match="There is no metric 'chess'"):
        accuracy_reward("chess")


def test_form_is_one_box():
    texts = ["so \\boxed{R}", "R", "\\boxed{R} or \\boxed{D}", "\\boxed{R"]
    assert format_reward(completions=say(*texts), reference=["R"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_the_bonus_is_for_samples_that_had_spans(processor):
    start, pad, end = processor.latent_token_ids
    ids = [[start, pad, pad, pad, end, 5], [5, 6], [start, pad, pad, pad, end], [5]]
    reward = span_reward(processor)
    assert reward(completion_ids=ids) == [1.0, 0.0, 1.0, 0.0]
    assert reward(completion_ids=ids, has_spans=[True, True, False, False]) == [1.0, 0.0, None, None]


RIGHT, WRONG = "\\boxed{R}", "\\boxed{D}"


def contrast(answers, latents, prompts=None, **settings):
    """Rewards of rollouts with one latent a span in two dimensions, whose answer should be R."""
    tensors = [torch.tensor(own, dtype=torch.bfloat16).reshape(-1, 1, 2) for own in latents]
    reward = latent_contrast_reward("boxed_exact_match", **settings)
    prompts = prompts or ["?"] * len(answers)
    return reward(prompts=prompts, completions=say(*answers), latents=tensors, reference=["R"] * len(answers))


def test_latents_are_rewarded_for_likeness_to_those_of_right_answers():
    """Worked out by hand: at right angles 0.5, opposite 0; the temperature is 0.5, so each counts twice."""
    right, across, left = [1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]
    own, half = math.exp(2), math.exp(1)
    found = contrast([RIGHT, RIGHT, WRONG], [right, across, left])
    expected = [half / (half + 1), half / (half + half), half / (half + own)]
    assert found == pytest.approx(expected, abs=1e-6)
    # The only right one is its own example; the longer rollout is compared up to the shorter's end.
    assert contrast([RIGHT, WRONG], [right + left, left]) == pytest.approx([own / (own + 1), 1 / (1 + own)], abs=1e-6)
    assert contrast([WRONG, WRONG], [right, across]) == pytest.approx([1 / (1 + own + half)] * 2, abs=1e-6)
    assert contrast([RIGHT, RIGHT], [right, across]) == pytest.approx([1.0, 1.0], abs=1e-6)
    assert contrast([RIGHT, RIGHT], [right, across], temperature=1.0) == pytest.approx([0.5, 0.5], abs=1e-6)


def test_latents_are_compared_within_their_group():
    right, left = [1.0, 0.0], [-1.0, 0.0]
    answers, latents = [RIGHT, WRONG, RIGHT, RIGHT, RIGHT], [right, left, left, [], right]
    found = contrast(answers, latents, prompts=["a", "a", "b", "b", "c"])
    own = math.exp(2)
    # In b one rollout has latents, which are its own example; a group of one has nothing to compare with.
    assert found == pytest.approx([own / (own + 1), 1 / (1 + own), 2.0, 0.0, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match="temperature is 0; it has to be above 0"):
        latent_contrast_reward("boxed_exact_match", temperature=0)


def test_prompts_are_questions_without_helper_images():
    samples = make_dataset([{**SAMPLES[0], "answer": "R"}, {**make_sample(["Right"], "Go"), "answer": "D"}])
    rows = make_prompts(samples)
    assert [len(row["images"]) for row in rows] == [1, 1] and len(samples[0]["images"]) > 1
    assert rows[0]["images"][0].tobytes() == samples[0]["images"][0].tobytes()
    assert rows["has_spans"] == [True, False] and rows["reference"] == ["R", "D"]
    assert [[message["role"] for message in row["prompt"]] for row in rows] == [["user"], ["user"]]
    assert [part["type"] for part in rows[1]["prompt"][0]["content"]] == ["image", "text"]


def test_a_task_of_ours_is_rewarded_by_its_own_metric():
    """FrozenLake's metric walks the plan on the board, which is its reference."""
    task = load_task("frozen_lake", maps={3: 2}, test_maps={3: 1})
    prompts = make_prompts(task.dataset("train"), task.reference)
    answers = task.dataset("train")["answer"]
    reward = accuracy_reward(task.metric)
    right = say(*(f"\\boxed{{{answer}}}" for answer in answers))
    assert reward(completions=right, reference=prompts["reference"]) == [1.0, 1.0]
    assert reward(completions=say("\\boxed{U}", "no"), reference=prompts["reference"]) == [0.0, 0.0]
