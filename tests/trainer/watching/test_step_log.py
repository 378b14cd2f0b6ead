"""What a run logs: means over micro-batches and ranks, complete, and the same however a batch is cut."""

import copy
import json

import pytest
import torch
from helpers import ALIGNMENT, PARTS, SAMPLES, SELECTION, SPEED, make_dataset, make_sample, make_trainer
from transformers import TrainerCallback

from ilvr.trainer.inputs.data_preparation import prepare_dataset
from ilvr.trainer.watching.step_log import StepLog


UNEQUAL = [make_sample(words, "Plan") for words in (["Up"] * 2, ["Up"] * 4, ["Up"] * 3, ["Left Down"])]


@pytest.mark.parametrize("training", [True, False])
def test_recorded_means_are_weighted_and_skip_nothings(model, processor, tmp_path, training):
    trainer = make_trainer(model, processor, tmp_path, max_steps=1)
    model.train(training)
    trainer.record(1, a=4.0)
    trainer.record(3, a=torch.tensor(8.0), b=1.0)
    trainer.record(torch.tensor(0), a=torch.tensor(torch.nan), c=torch.tensor(torch.nan))
    trainer.record_tokens(5)
    trainer.record_tokens(torch.tensor(6))
    trainer.log(logs := {})
    prefix = "" if training else "eval_"
    assert logs[f"{prefix}a"] == 7 and logs[f"{prefix}b"] == 1 and f"{prefix}c" not in logs
    assert logs.get("num_tokens") == (11 if training else None)
    trainer.log(again := {})
    assert not again.keys() & {f"{prefix}a", f"{prefix}b"}


def test_ranks_with_other_names_and_numbers_of_values(monkeypatch):
    class Accelerator:
        num_processes = 2

        device = torch.device("cpu")

    other = {"sums": {"a": [10.0, 5.0], "only_there": [2.0, 1.0]}, "totals": {"tokens": 7.0}}
    monkeypatch.setattr("ilvr.trainer.watching.step_log.gather_object", lambda mine: [*mine, other])
    log = StepLog(Accelerator())
    log.add_means(2, a=1.0, only_here=3.0)
    log.add_means(1, a=2.0)
    log.add_totals(tokens=4)
    resumed = StepLog(Accelerator())
    resumed.load_state_dict(json.loads(json.dumps(log.state_dict())))
    for counted in (log, resumed):
        means, totals = counted.read()
        assert means == {"a": 14 / 8, "only_here": 3, "only_there": 2} and totals == {"tokens": 11}
        assert counted.read() == ({"a": 2, "only_there": 2}, {"tokens": 7})  # this rank has counted nothing since


def test_evaluation_in_between_leaves_the_window_alone(model, processor, tmp_path):
    """Steps 1 to 4 are logged together, with evaluations after 2 and 4; without them, the log is the same."""

    class EvaluateCallback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = state.global_step in (2, 4)

    logs = []
    for callbacks in (None, [EvaluateCallback()]):
        settings = {"max_steps": 4, "logging_steps": 4, "per_device_eval_batch_size": 2, "callbacks": callbacks}
        trainer = make_trainer(copy.deepcopy(model), processor, tmp_path, **settings)
        trainer.eval_dataset = prepare_dataset(make_dataset(SAMPLES[:3]), processor, stage=1)
        trainer.train()
        logs.append(next(log for log in trainer.state.log_history if "loss" in log))
    assert logs[0].keys() == logs[1].keys()
    for name in logs[0].keys() - SPEED:
        assert logs[0][name] == logs[1][name], name
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 2 and all({"eval_ce_loss", "eval_selected_1"} <= log.keys() for log in evaluations)


def test_resumed_runs_go_on_with_their_sums(model, processor, tmp_path):
    """The line of step 4, from a checkpoint of step 3: tokens and time of steps 3 and 4."""
    other = copy.deepcopy(model)
    settings = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(model, processor, tmp_path, **settings)
    whole.train()
    resumed = make_trainer(other, processor, tmp_path, **settings)
    steps = []
    read, resumed.clock.read = resumed.clock.read, lambda tokens: steps.append(resumed.clock.steps) or read(tokens)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert steps == [2, 0]  # at the line of step 4, and at the end
    expected, found = whole.state.log_history[1], resumed.state.log_history[1]
    assert found["num_tokens"] == 2 * sum(whole.train_dataset["length"])  # four steps of four of eight samples
    assert all(found[name] == expected[name] for name in expected.keys() - SPEED) and found.keys() >= SPEED


@pytest.mark.parametrize("stage", [1, 2])
def test_log_is_complete_and_the_same_under_accumulation(model, processor, tmp_path, stage):
    """Samples of 1, 3, 2 and 0 spans, in one batch and one by one: means over spans and words, not over batches."""
    logs = []
    for size in (4, 1):
        settings = {"stage": stage, "max_steps": 1, "per_device_train_batch_size": size}
        settings |= {"gradient_accumulation_steps": 4 // size, "selection_temperature": 0.3}
        trainer = make_trainer(copy.deepcopy(model), processor, tmp_path, UNEQUAL, **settings)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    expected = PARTS | SPEED | (ALIGNMENT | SELECTION if stage == 1 else set())
    for log in logs:
        assert expected <= log.keys() and "gpu_memory_gib" not in log
        assert not (stage == 2 and log.keys() & (ALIGNMENT | SELECTION))
        assert log["spans_per_sample"] == 1.5
        assert log["num_tokens"] == sum(trainer.train_dataset["length"])
        assert log["tokens_per_second"] == pytest.approx(log["num_tokens"] / log["step_time"])
        if stage == 1:
            shares = [log[f"selected_{k}"] for k in (1, 2, 3)]
            assert sum(shares) == pytest.approx(1)
            assert sum(k * share for k, share in enumerate(shares, 1)) == pytest.approx(log["selected_per_span"])
            assert log["loss"] == pytest.approx(log["ce_loss"] + log["alignment_loss"], rel=1e-4)
    # The spread of targets is taken within a batch, and distances of teachers come after steps of Adam.
    for name in expected - SPEED - {"target_similarity", "teacher_distance"}:
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-3), name
