"""Accuracy with a sample's own latents and with another's, in the log of a run."""

import copy

import pytest
import torch
from helpers import SAMPLES, make_dataset, make_trainer
from transformers import EarlyStoppingCallback, LogitsProcessorList

from ilvr.evaluation import Questions, SwapGapCallback


ASKED = make_dataset([{**sample, "answer": f"answer {i}"} for i, sample in enumerate(SAMPLES[:5])])
GAP = ("eval_accuracy", "eval_swapped_accuracy", "eval_swap_gap", "eval_emission_rate")


def test_gap_is_logged_at_evaluations_and_training_is_as_without(model, processor, tmp_path, monkeypatch):
    settings = {"stage": 2, "max_steps": 4, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    other, logs, seen = copy.deepcopy(model), [], []
    questions = Questions.of_dataset(ASKED)
    monkeypatch.setattr(
        Questions, "is_right", lambda self, answers, references: seen.append(references[0]) or [len(seen) % 2 == 0]
    )
    for trained, with_gap in ((model, True), (other, False)):
        trainer = make_trainer(trained, processor, tmp_path, **settings, do_eval=True, eval_dataset=ASKED)
        if with_gap:
            trainer.add_callback(SwapGapCallback(trainer, questions, batch_size=3, max_new_tokens=12))
        trainer.train()
        logs.append(trainer.state.log_history)
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert a.equal(b), name
    found = [line for line in logs[0] if "eval_swap_gap" in line]
    assert [line["step"] for line in found] == [2, 4] and {*GAP} <= found[0].keys()
    for line in found:
        assert line["eval_swap_gap"] == pytest.approx(line["eval_accuracy"] - line["eval_swapped_accuracy"])
    assert seen == [f"answer {i}" for i in range(5)] * 4  # own and swapped, twice
    plain = [line for line in logs[0] if not line.keys() & {*GAP}]
    times = {"step_time", "tokens_per_second", "epoch", "eval_runtime", "train_runtime"}
    for a, b in zip(plain, logs[1], strict=True):
        names = {name for name in a.keys() - times if "second" not in name}
        assert {name: a[name] for name in names} == {name: b[name] for name in names}


def test_before_training_and_every_so_many_steps_without_an_evaluation(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, stage=2, max_steps=3)
    trainer.add_callback(SwapGapCallback(trainer, ASKED, every=2, max_new_tokens=4))
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_swap_gap" in line] == [0, 2]
    assert model.training


def test_a_run_stops_when_the_gap_closes_and_keeps_the_best(model, processor, tmp_path, monkeypatch):
    """The callback is added last and asked first."""
    settings = {"stage": 2, "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": ASKED}
    settings |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(
        model, processor, tmp_path, metric_for_best_model="eval_swap_gap", callbacks=[stop], **settings
    )
    gap, gaps, weights = SwapGapCallback(trainer, ASKED), iter([0.1, 0.5, 0.2, 0.3, 0.9]), []

    def measure():
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {**dict.fromkeys(GAP, 0.0), "eval_swap_gap": next(gaps)}

    monkeypatch.setattr(gap, "measure", measure)
    trainer.add_callback(gap)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.best_metric == 0.5
    for name, parameter in model.named_parameters():
        assert parameter.equal(weights[1][name]), name


def test_swapped_answers_come_of_swapped_latents(model, processor, tmp_path, monkeypatch):
    """What is fed in the second pass is what the sample before had in the first; the first sample gets the last's."""
    trainer, generate, latents = make_trainer(model, processor, tmp_path, stage=2), model.generate, []
    start_id = model.config.latent_start_token_id

    def open_a_span(ids, scores):
        scores[(ids != start_id).all(1), start_id] = 1e4
        return scores

    def opening(**kwargs):
        output = generate(**{**kwargs, "output_latents": True}, logits_processor=LogitsProcessorList([open_a_span]))
        latents.extend(row[0].clone() for row in output.latents)
        return output

    monkeypatch.setattr(model, "generate", opening)
    found = SwapGapCallback(trainer, ASKED, batch_size=2, max_new_tokens=12).measure()
    assert found["eval_emission_rate"] == 1.0
    own, fed = latents[:5], latents[5:]
    for sample in range(5):
        torch.testing.assert_close(fed[sample], own[sample - 1])


def test_what_cannot_be_measured_is_refused(model, processor, tmp_path, monkeypatch):
    trainer = make_trainer(model, processor, tmp_path, stage=2)
    with pytest.raises(ValueError, match="answer: sample 0 of questions has none"):
        SwapGapCallback(trainer, ASKED.remove_columns("answer"))
    with pytest.raises(ValueError, match="got 1 and num_samples=64"):
        SwapGapCallback(trainer, ASKED.select([0]))
    monkeypatch.setattr("ilvr.evaluation.in_training.is_zero3", lambda accelerator: True)
    with pytest.raises(ValueError, match="ZeRO-3 cannot generate"):
        SwapGapCallback(trainer, ASKED)
