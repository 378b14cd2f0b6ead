"""Answers as records: what they hold, runs that were killed, runs of something else."""

import json

import pytest
import torch
from helpers import make_dataset

from ilvr.evaluation import Evaluator, Questions, records
from ilvr.tasks import load_task


TASK = {"boards": 2, "test_boards": 7, "lengths": [1, 3]}


@pytest.fixture
def questions():
    return Questions.of_task(load_task("shifts", **TASK))


@pytest.fixture
def settings(processor):
    """Short answers with spans in them."""
    start_id = processor.latent_token_ids[0]
    return {"batch_size": 3, "max_new_tokens": 14, "sequence_bias": [[[start_id], 6.0]]}


def lines(path):
    return path.read_text().splitlines()


def without_time(run):
    return [{**vars(record), "seconds": 0} for record in run.records]


def test_a_record_a_sample(model, processor, questions, settings, tmp_path):
    run = Evaluator(model, processor, questions, folder=tmp_path, **settings).run(keep_latents=True)
    header, *rows = map(json.loads, lines(tmp_path / "own.jsonl"))
    assert header["control"] == "own" and header["batch_size"] == 3 and header["metric"] == "boxed_exact_match"
    assert [row["index"] for row in rows] == list(range(7)) and rows == [vars(record) for record in run.records]
    assert [row["reference"] for row in rows] == questions.references
    assert [len(own) for own in run.latents] == [row["spans"] for row in rows] and max(map(len, run.latents)) > 0
    assert all(row["tokens"] == 14 or row["finished"] for row in rows)


def test_what_is_parsed_and_right(model, processor, questions, monkeypatch):
    said = [f"so \\boxed{{{questions.references[0]}}}", "\\boxed{z z}", "nothing"]
    answers = [records.Answer(text, 4, 0, True) for text in said]
    monkeypatch.setattr(records, "answer_batch", lambda *_, **__: [answers.pop(0)])
    few = Questions(questions.dataset.select([0, 1, 2]), questions.references[:3])
    run = Evaluator(model, processor, few, batch_size=1).run()
    assert [record.parsed for record in run.records] == [questions.references[0], "z z", None]
    assert run.right == [True, False, False]


def test_lengths_end_with_the_end_of_the_answer():
    from ilvr.evaluation.generation import _lengths

    ids = torch.tensor([[5, 2, 0, 0], [5, 5, 5, 5], [9, 2, 2, 0]])
    assert _lengths(ids, [2, 9]) == ([2, 4, 1], [True, False, True])
    assert _lengths(ids, None) == ([4, 4, 4], [False] * 3)


@pytest.mark.parametrize("kept", [0, 30, 2, 4, 6])  # bytes of the first line, or whole lines and a part of one
def test_a_killed_run_goes_on(model, processor, questions, settings, tmp_path, kept, monkeypatch):
    whole = Evaluator(model, processor, questions, folder=tmp_path / "whole", **settings).run(keep_latents=True)
    text = lines(tmp_path / "whole" / "own.jsonl")
    Evaluator(model, processor, questions, folder=tmp_path / "cut", **settings).run(keep_latents=True)
    cut = tmp_path / "cut" / "own.jsonl"
    cut.write_text(text[0][:30] if kept == 30 else "\n".join([*text[: 1 + kept], text[1 + kept][:20]]))
    asked, answer_batch = [], records.answer_batch
    monkeypatch.setattr(records, "answer_batch", lambda *a, **k: asked.append(len(a[2])) or answer_batch(*a, **k))
    again = Evaluator(model, processor, questions, folder=tmp_path / "cut", **settings).run(keep_latents=True)
    assert without_time(again) == without_time(whole)
    assert asked == {0: [3, 3, 1], 30: [3, 3, 1], 2: [3, 3, 1], 4: [3, 1], 6: [1]}[kept]
    for one, other in zip(again.latents, whole.latents):
        assert torch.equal(one, other)
    assert [json.loads(line)["index"] for line in lines(cut)[1:]] == list(range(7))


def test_latents_that_were_not_kept_are_made(model, processor, questions, settings, tmp_path):
    Evaluator(model, processor, questions, folder=tmp_path, **settings).run()
    run = Evaluator(model, processor, questions, folder=tmp_path, **settings).run(keep_latents=True)
    assert len(run.latents) == len(run.records) == 7 and len(lines(tmp_path / "own.jsonl")) == 8


@pytest.mark.parametrize("change", ["model", "questions", "batch_size", "generate", "file"])
def test_another_run_is_refused_by_name(model, processor, questions, settings, tmp_path, change):
    Evaluator(model, processor, questions, folder=tmp_path, **settings).run()
    name = change
    if change == "model":
        with torch.no_grad():
            model.get_input_embeddings().weight[3] += 1
    elif change == "questions":
        questions = Questions.of_task(load_task("shifts", **TASK, seed=1))
    elif change == "batch_size":
        settings["batch_size"] = 4
    elif change == "generate":
        settings["max_new_tokens"] = 5
    else:
        (tmp_path / "own.jsonl").write_text("{}\n")
        name = "no file of records"
    with pytest.raises(ValueError, match=f"own.jsonl.*{name}"):
        Evaluator(model, processor, questions, folder=tmp_path, **settings).run()


def test_questions_are_told_apart_by_their_pictures(questions):
    swapped = questions.dataset["images"][:]
    swapped[0], swapped[1] = swapped[1], swapped[0]
    other = questions.dataset.remove_columns("images").add_column("images", swapped).cast(questions.dataset.features)
    assert Questions(other, questions.references).fingerprint != questions.fingerprint
    again = Questions.of_task(load_task("shifts", **TASK))
    assert again.fingerprint == questions.fingerprint


def test_questions_of_a_data_set():
    data = make_dataset()
    with pytest.raises(ValueError, match="answer: sample 0 of mine has none"):
        Questions.of_dataset(data, name="mine")
    data = data.add_column("answer", [str(i) for i in range(len(data))])
    assert Questions.of_dataset(data, samples=3).references == ["0", "2", "5"]
    with pytest.raises(ValueError, match="`samples` must be at least 1, got 0"):
        Questions.of_dataset(data, samples=0)
    with pytest.raises(ValueError, match="8 questions and 2 references"):
        Questions(data, ["a", "b"])


def test_settings_that_no_file_can_hold(model, processor, questions):
    with pytest.raises(ValueError, match="is a control"):
        Evaluator(model, processor, questions, latent_intervention=lambda *_: None)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        Evaluator(model, processor, questions, batch_size=0)
