"""Public layouts of evaluation data, and the metrics that score them."""

import json

import pytest
from helpers import NATIVE, REFERENCE, write_jsonl

from ilvr.data import prompt_of
from ilvr.evaluation import load_metric, load_questions, scores_by_group


VSP = {
    "text_input": "Plan a path on <image> and put it into \\boxed{}.",
    "image_input": ["board.png"],
    "map_id": 7,
    "map_desc": [[1, 0, 0], [-1, 0, 0], [0, 0, 2]],
}
SMALL = {**VSP, "map_id": 8, "map_desc": [[1, 0], [-1, 2]]}
COMT = {"text_input": "Which? (A) one (B) two", "image_input": ["board.png"], "original_final_answer": "B"}


def test_vsp(image_root):
    """Boards are references; both rules, and sizes apart."""
    questions = load_questions(write_jsonl(image_root / "test_direct.jsonl", [VSP, SMALL]))
    assert (questions.name, questions.metric_name) == ("test_direct", "frozen_lake")
    assert questions.references == [["SFF", "HFF", "FFG"], ["SF", "HG"]]
    assert json.loads(questions.dataset[0]["metadata"]) == {"map_id": 7, "board": ["SFF", "HFF", "FFG"]}
    (turn,) = prompt_of(questions.dataset[0])
    assert [part["type"] for part in turn["content"]] == ["text", "image", "text"]
    # Over the goal and on into the row below; the goal of the small board is not reached.
    found = questions.score(["\\boxed{R R D D L}", "\\boxed{R}"])
    assert (found["end_on_goal"], found["first_hit"]) == (0, 0.5)
    assert (found["first_hit_3x3"], found["first_hit_2x2"], found["count_2x2"]) == (1, 0, 1)
    assert questions.is_right(["\\boxed{R R D D}", "\\boxed{R D}"], questions.references) == [True, True]
    assert set(scores_by_group(found)) == {"", "2x2", "3x3"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"map_desc": [[1, 0], [2]]}, r"line 2: map_desc\[1\]: has 1 cells on a board of 2 rows"),
        ({"map_desc": [[1, 0], [3, 2]]}, r"map_desc\[1\]: unknown cell 3. Use one of \[1, 2, 0, -1\]"),
        ({"map_desc": [[1, 0], [0, 0]]}, "map_desc: has 0 goals. A board has one"),
        ({"map_desc": [[1, 1], [0, 2]]}, "map_desc: has 2 starts"),
        ({"map_desc": "1 0"}, "map_desc: must be a list"),
        ({"image_input": ["none.png"]}, r"image_input\[0\]: there is no file"),
        ({"text_input": "<image>"}, "user turn: has no words"),
    ],
)
def test_bad_rows_of_vsp(image_root, change, message):
    path = write_jsonl(image_root / "rows.jsonl", [VSP, {**VSP, **change}])
    with pytest.raises(ValueError, match=message):
        load_questions(path)


def test_reference_layout(image_root):
    """Questions with a letter as the answer, without a trace; with one, they are read as to train on."""
    path = write_jsonl(image_root / "comt.jsonl", [COMT, {**COMT, "original_final_answer": "(A)"}])
    questions = load_questions(path, metric="multiple_choice")
    assert questions.score(["\\boxed{B}", "so (B)"])["accuracy"] == 0.5
    assert [turn["role"] for turn in questions.dataset[0]["messages"]] == ["user"]
    traced = load_questions(write_jsonl(image_root / "traced.jsonl", [REFERENCE]))
    assert traced.references == ["R"] and len(traced.dataset[0]["messages"]) == 2
    native = load_questions(write_jsonl(image_root / "native.jsonl", [NATIVE] * 3), samples=2)
    assert native.references == ["Up"] * 2
    bad = write_jsonl(image_root / "bad.jsonl", [COMT, {**COMT, "original_final_answer": "two"}])
    with pytest.raises(ValueError, match="'two' is no letter from A to J"):
        load_questions(bad, metric="multiple_choice")
    with pytest.raises(ValueError, match="answer: sample 1 of missing has none"):
        load_questions(write_jsonl(image_root / "missing.jsonl", [COMT, {**COMT, "original_final_answer": None}]))
    with pytest.raises(ValueError, match="has no rows"):
        load_questions(write_jsonl(image_root / "empty.jsonl", []))


CHOICES = {"question": "Which?", "options": ["one", "two", "B"], "answer": "two", "image": "board.png", "id": 3}


def test_choices(image_root):
    """Answers by letter, number and text; options by letter; images where they are marked."""
    rows = [CHOICES, {**CHOICES, "answer": 0}, {**CHOICES, "answer": "(c)"}, {**CHOICES, "answer": "B"}]
    marked = {"question": "On <image> or <image>?", "choices": ["first", "second"], "answer": 1}
    rows += [{**marked, "images": ["board.png", "board.png"]}, {**marked, "question": "Yes?"}]
    questions = load_questions(write_jsonl(image_root / "choices.jsonl", rows))
    # "B" is an option's text here, and so is what it says
    assert questions.references == ["B", "A", "C", "C", "B", "B"] and questions.metric_name == "multiple_choice"
    assert questions.score(["\\boxed{B}"] * 6)["accuracy"] == 0.5
    image, text = questions.dataset[0]["messages"][0]["content"]
    assert image["type"] == "image" and len(questions.dataset[0]["images"]) == 1
    assert text["text"].splitlines()[:4] == ["Which?", "A. one", "B. two", "C. B"] and "\\boxed{}" in text["text"]
    assert json.loads(questions.dataset[0]["metadata"]) == {"options": ["one", "two", "B"], "id": 3}
    kinds = [part["type"] for part in questions.dataset[4]["messages"][0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert load_questions(write_jsonl(image_root / "exact.jsonl", [CHOICES]), metric="boxed_exact_match").metric_name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": "D"}, "line 2: answer: 'D' is no letter from A to C, no number below 3 and no option"),
        ({"answer": 3}, "answer: 3 is no letter"),
        ({"answer": True}, "answer: True is no letter"),
        ({"options": ["one"]}, "options: has 1 options. Give 2 to 10"),
        ({"options": [1, 2]}, r"options\[0\]: must be a str, got 1"),
        ({"options": "one, two"}, "options: must be a list"),
        ({"choices": ["one", "two"]}, "choices: is there beside options"),
        ({"images": ["board.png"]}, "images: is there beside image"),
        ({"question": 7}, "question: must be a text, got 7"),
        ({"question": None}, "question: is missing"),
        ({"image": "none.png"}, r"image_input\[0\]: there is no file"),
    ],
)
def test_bad_rows_of_choices(image_root, change, message):
    path = write_jsonl(image_root / "rows.jsonl", [CHOICES, {**CHOICES, **change}])
    with pytest.raises(ValueError, match=message):
        load_questions(path)


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{ (b) }", "B"),
        ("\\boxed{\\text{J}}", "J"),
        ("\\boxed{C. two of them}", "C"),
        ("\\boxed{(D) two}", "D"),
        ("(A) or \\boxed{A}, no: \\boxed{B}", "B"),
        ("not (A) but (B).", "B"),
        ("so it is (B)\n", "B"),
        ("(B) is wrong", None),
        ("A", None),  # a letter alone at the end of words is as likely an article
        ("\\boxed{A cat}", None),
        ("\\boxed{K}", None),
        ("\\boxed{AB}", None),
        ("\\boxed{} (B)", None),  # the box is the answer
    ],
)
def test_multiple_choice(answer, letter):
    metric = load_metric("multiple_choice")
    assert metric.parse(answer) == letter
    right = metric.compute(predictions=[answer] * 2, references=[letter or "A", "I"])
    assert right["accuracy"] == (0.5 if letter else 0) and right["invalid"] == (letter is None)
    assert right["count"] == 2 and right["accuracy_low"] <= right["accuracy"] <= right["accuracy_high"]
