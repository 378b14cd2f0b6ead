r"""Rewards: by a task's metric, by form, by use of latents; and the prompts that they are given for."""

import pytest
from helpers import SAMPLES, make_dataset, make_sample

from ilvr.tasks import load_task
from ilvr.trainer import make_prompts
from ilvr.trainer.rewards import accuracy_reward, format_reward, span_reward


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
