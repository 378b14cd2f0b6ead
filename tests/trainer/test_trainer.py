"""Training runs of a few steps: the teacher, accumulation, resume, caching, what is logged."""

import copy

import datasets
import pytest
import torch
from backbones import FULLY_TESTED
from helpers import SAMPLES, make_dataset, make_sample, make_trainer

from ilvr import hide_images_after_first_span
from ilvr.trainer import ILVRTrainer, ILVRTrainingConfig
from ilvr.trainer.inputs.data_collator import LatentBatch
from ilvr.trainer.inputs.data_preparation import prepare_dataset
from ilvr.trainer.running.adapters import vision_modules


BACKBONES = FULLY_TESTED


def test_freezing(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not p.equal(before[n])}
    vision = tuple(vision_modules(model))
    assert not any(name.startswith(vision) for name in moved) and any(name.startswith(vision) for name in before)
    assert any("layers.0.mlp" in name for name in moved) and any("embed_tokens" in name for name in moved)


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_equals_one_large_batch(model, processor, tmp_path, stage):
    other = copy.deepcopy(model)
    one = make_trainer(model, processor, tmp_path, stage=stage, per_device_train_batch_size=8, max_steps=2)
    eight = make_trainer(
        other,
        processor,
        tmp_path,
        stage=stage,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        max_steps=2,
    )
    # SGD: Adam would turn rounding errors of tiny gradients into whole steps.
    for trainer in (one, eight):
        trainer.optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-2)
        trainer.train()
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert one.state.log_history[0]["loss"] == pytest.approx(eight.state.log_history[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_resume_equals_an_uninterrupted_run(model, processor, tmp_path, stage):
    settings = {"stage": stage, "max_steps": 6, "teacher_decay": 0.9}
    whole_model, resumed_model = copy.deepcopy(model), copy.deepcopy(model)
    whole = make_trainer(whole_model, processor, tmp_path / "a", **settings)
    whole.train()
    first = make_trainer(model, processor, tmp_path / "b", save_strategy="steps", save_steps=3, **settings)
    first.train()
    resumed = make_trainer(resumed_model, processor, tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    for (name, a), b in zip(whole_model.named_parameters(), resumed_model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    if stage == 1:
        for a, b in zip(whole.teacher.model.parameters(), resumed.teacher.model.parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_alignment_pulls_the_latents_to_the_targets(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, max_steps=30, ce_weight=0.0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "alignment_loss" in entry]
    assert logs[-1]["alignment_loss"] < 0.5 * logs[0]["alignment_loss"]
    assert logs[-1]["latent_cosine"] == pytest.approx(1 - logs[-1]["alignment_loss"], abs=0.01)


def test_log_has_every_part(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, ce_weight=0.5, alignment_weight=2.0, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.5 * log["ce_loss"] + 2.0 * log["alignment_loss"], rel=1e-4)
    assert 1 <= log["selected_per_span"] <= 3 and 0 < log["selected_mass"] <= 1
    assert log["teacher_distance"] >= 0 and log["spans_per_sample"] >= 1 and -1 <= log["target_similarity"] <= 1
    assert {"mean_token_accuracy", "entropy", "num_tokens"} <= log.keys()


@pytest.mark.parametrize("anneal", [False, True])
def test_stage_2_aligns_its_own_latents_on_request(model, processor, tmp_path, anneal):
    """The loss of the first step is that of the walk's latents; the weight falls over the run if it is to."""
    settings = {"stage": 2, "alignment_weight": 4.0, "alignment_anneal": anneal, "alignment_noise": 0.0}
    settings |= {"selection_schedule": "once", "per_device_train_batch_size": 8}
    trainer = make_trainer(model, processor, tmp_path, **settings)
    batch = trainer._batch_of(list(trainer.train_dataset))
    selection = trainer.select_targets(batch)
    walked = model.model(**batch.inputs).predicted_latents
    cosine = torch.cosine_similarity(walked, selection.targets, dim=-1)[selection.mask].mean()
    trainer.train()
    logs = [line for line in trainer.state.log_history if "alignment_loss" in line]
    assert logs[0]["latent_cosine"] == pytest.approx(cosine.item(), rel=1e-3)
    weights = [line.get("alignment_weight", 4.0) for line in logs]
    assert weights == ([4.0, 3.0, 2.0, 1.0] if anneal else [4.0] * 4)
    for line, weight in zip(logs, weights):
        assert line["loss"] == pytest.approx(line["ce_loss"] + weight * line["alignment_loss"], rel=1e-4)
    assert logs[-1]["alignment_loss"] < logs[0]["alignment_loss"]


def test_stage_2_has_no_teacher_and_a_small_rate_by_itself(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, stage=2)
    assert trainer.teacher is None and trainer.select_targets is None and trainer.args.alignment_weight == 0.0
    rates = {stage: ILVRTrainingConfig(str(tmp_path), stage=stage, bf16=False, use_cpu=True) for stage in (1, 2)}
    assert {stage: args.learning_rate for stage, args in rates.items()} == {1: 1e-5, 2: 2e-7}
    assert (
        ILVRTrainingConfig(str(tmp_path), stage=2, learning_rate=1e-5, bf16=False, use_cpu=True).learning_rate == 1e-5
    )
    with pytest.raises(
        ValueError, match="`alignment_weight` must be at least 0, and above it with `alignment_anneal`"
    ):
        make_trainer(model, processor, tmp_path, stage=2, alignment_anneal=True)


def test_samples_without_spans_train_as_text(model, processor, tmp_path):
    text = make_sample(["Right Down"])
    mixed = [text, SAMPLES[0], text, SAMPLES[1]]
    for stage, samples, size in ((2, [text] * 4, 4), (2, mixed, 4), (1, mixed, 4), (1, mixed, 1)):
        settings = {"stage": stage, "per_device_train_batch_size": size, "max_steps": 4 // size}
        trainer = make_trainer(copy.deepcopy(model), processor, tmp_path, samples, **settings)
        trainer.train()
        assert trainer.state.log_history[0]["grad_norm"] > 0


def test_collapsed_targets_are_warned_of(model, processor, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("ilvr.trainer.alignment.mean_pairwise_cosine", lambda targets: 0.995)
    monkeypatch.setattr("ilvr.trainer.ilvr_trainer.logger.warning_once", messages.append)
    make_trainer(model, processor, tmp_path, max_steps=1).train()
    assert any("nearly all alike" in message for message in messages)


def test_evaluation_logs_the_same_parts(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, max_steps=1)
    prepared = prepare_dataset(make_dataset(SAMPLES[:4]), processor, stage=1)
    metrics = trainer.evaluate(prepared)
    assert metrics["eval_loss"] > 0
    assert {"eval_ce_loss", "eval_alignment_loss"} <= trainer.state.log_history[-1].keys()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_rule_of_attention_holds_for_the_student_and_not_for_the_teacher(model, processor, tmp_path, stage):
    logs, cards = [], []
    for rule in (None, hide_images_after_first_span):
        args = make_trainer(model, processor, tmp_path, stage=stage, max_steps=1).args
        trainer = ILVRTrainer(
            *(copy.deepcopy(model), args),
            train_dataset=make_dataset(SAMPLES),
            processing_class=processor,
            attention_rule=rule,
        )
        inputs = LatentBatch.of(trainer.data_collator([trainer.train_dataset[i] for i in range(2)])).inputs
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
        with torch.no_grad():
            _, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
            given = {} if stage == 2 else {"latent_values": outputs.latent_inputs}
            expected = trainer.model(**inputs, **given, attention_rule=rule).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(outputs.logits[real], expected[real], rtol=1e-4, atol=1e-4)
        trainer.train()
        logs.append(trainer.state.log_history[0])
        cards.append(trainer.card_settings())
    assert logs[0]["ce_loss"] != logs[1]["ce_loss"]
    assert logs[0].get("selected_mass") == logs[1].get("selected_mass")
    assert "attention rule" not in cards[0] and cards[1]["attention rule"] == "hide_images_after_first_span"


def test_outputs_of_evaluation_have_all_columns(model, processor, tmp_path):
    """What `compute_metrics` gets: logits and labels of the same length."""
    trainer = make_trainer(model, processor, tmp_path, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
        assert loss == pytest.approx(trainer.compute_loss(model, batch).item(), rel=1e-5)
    assert outputs.logits.shape[:2] == batch["labels"].shape


def test_streaming_dataset(model, processor, tmp_path):
    args = ILVRTrainingConfig(
        str(tmp_path),
        stage=1,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        bf16=False,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    stream = make_dataset().to_iterable_dataset()
    ILVRTrainer(model, args, train_dataset=stream, processing_class=processor).train()
    with pytest.raises(ValueError, match="cache_images"):
        args.cache_images = True
        ILVRTrainer(model, args, train_dataset=stream, processing_class=processor)


datasets.disable_progress_bars()
