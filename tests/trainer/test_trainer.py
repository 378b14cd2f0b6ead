"""Training runs of a few steps: the teacher, accumulation, resume, caching, what is logged."""

import copy
import random
from itertools import pairwise

import datasets
import pytest
import torch
from backbones import FULLY_TESTED
from helpers import SAMPLES, make_dataset, make_sample, make_trainer

from ilvr.trainer import ILVRTrainer, ILVRTrainingConfig, LatentDataCollator
from ilvr.trainer.inputs.data_collator import align_spans
from ilvr.trainer.inputs.data_preparation import prepare_dataset
from ilvr.trainer.inputs.sampler import SpanGroupedSampler
from ilvr.trainer.running.adapters import vision_modules
from ilvr.trainer.teacher import MomentumTeacher


BACKBONES = FULLY_TESTED


def trained_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_teacher_moves_by_the_ema_formula_in_train(model, processor, tmp_path, dtype, accumulation):
    """Also in a bf16 model, where a bf16 average would stand still, and once per optimizer step only."""
    model.to(dtype)
    decay = 0.99
    trainer = make_trainer(model, processor, tmp_path, teacher_decay=decay, gradient_accumulation_steps=accumulation)
    expected = {name: p.float() for name, p in trained_weights(model).items()}
    updates = []
    original = trainer.teacher.update

    def update(student):
        updates.append(trainer.state.global_step)
        for name, weight in trained_weights(model).items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.float()
        original(student)

    trainer.teacher.update = update
    start = {name: p.clone() for name, p in expected.items()}
    trainer.train()
    assert updates == [1, 2, 3, 4]
    found = {f"model.{name}": p for name, p in trainer.teacher.model.named_parameters()}
    unused = expected.keys() - found.keys()  # a head with weights of its own
    assert len(unused) <= 1 and expected.keys() & found.keys()
    for name in expected.keys() & found.keys():
        weight = expected[name]
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].data, weight, rtol=1e-5, atol=1e-7)
    assert max(float((found[n] - start[n]).abs().max()) for n in start.keys() & found.keys()) > 1e-4


def test_teacher_is_no_part_of_the_student_and_shares_what_is_frozen(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path)
    assert not any("teacher" in name for name, _ in model.named_modules())
    student, teacher = dict(model.model.named_parameters()), dict(trainer.teacher.model.named_parameters())
    for name, parameter in teacher.items():
        assert (student[name] is parameter) == (not student[name].requires_grad), name
    assert not any(name.startswith(tuple(vision_modules(model.model))) for name in teacher)
    assert any(student[name].requires_grad for name in teacher)
    assert "forward" not in trainer.teacher.model.__dict__  # TRL patches the student's instance
    assert not any(p.requires_grad for p in teacher.values())


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


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("freeze", [True, False])
def test_caching_images_changes_nothing(model, processor, tmp_path, stage, freeze):
    other = copy.deepcopy(model)
    settings = {"stage": stage, "freeze_vision_tower": freeze, "max_steps": 3}
    plain = make_trainer(model, processor, tmp_path, **settings)
    cached = make_trainer(other, processor, tmp_path, cache_images=True, **settings)
    calls = []
    for trainer in (plain, cached):
        tower = trainer.model.get_submodule(vision_modules(trainer.model)[0])
        tower.register_forward_hook(lambda *_, owner=trainer: calls.append(owner))
        trainer.train()
    assert plain in calls and (cached in calls) == (not freeze)
    for step in range(3):
        a, b = plain.state.log_history[step]["loss"], cached.state.log_history[step]["loss"]
        assert a == pytest.approx(b, rel=1e-5)


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
    monkeypatch.setattr("ilvr.trainer.ilvr_trainer.mean_pairwise_cosine", lambda targets: 0.995)
    monkeypatch.setattr("ilvr.trainer.ilvr_trainer.logger.warning_once", messages.append)
    make_trainer(model, processor, tmp_path, max_steps=1).train()
    assert any("nearly all alike" in message for message in messages)


def test_evaluation_logs_the_same_parts(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, max_steps=1)
    prepared = prepare_dataset(make_dataset(SAMPLES[:4]), processor, stage=1)
    metrics = trainer.evaluate(prepared)
    assert metrics["eval_loss"] > 0
    assert {"eval_ce_loss", "eval_alignment_loss"} <= trainer.state.log_history[-1].keys()


def test_outputs_of_evaluation_have_all_columns(model, processor, tmp_path):
    """What `compute_metrics` gets: logits and labels of the same length."""
    trainer = make_trainer(model, processor, tmp_path, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
        assert loss == pytest.approx(trainer.compute_loss(model, batch).item(), rel=1e-5)
    assert outputs.logits.shape[:2] == batch["labels"].shape


def test_teacher_equals_the_student_at_first(model):
    teacher = MomentumTeacher(model.model, 0.999)
    assert teacher.distance(model.model) == 0.0


def test_spans_of_a_batch_are_aligned(processor):
    start, pad, end = processor.latent_token_ids
    a = [1, 2, start, pad, pad, end, 3, start, pad, pad, end, 4]
    b = [1, 2, 5, start, pad, pad, end, 3, 3, 3]
    layout = align_spans([a, b], start)
    laid = [[row[i] if i >= 0 else 0 for i in columns] for row, columns in zip([a, b], layout)]
    assert laid[0] == [0, 1, 2, start, pad, pad, end, 3, 0, 0, start, pad, pad, end, 4]
    assert laid[1] == [1, 2, 5, start, pad, pad, end, 3, 3, 3, 0, 0, 0, 0, 0]


def test_collator_on_literal_tensors(processor):
    samples = [make_sample(["Right", "Up"]), make_sample(["Right Down Left", "Up", "Up"], "Plan a path")]
    prepared = prepare_dataset(make_dataset(samples), processor, stage=1)
    rows = [prepared[i] for i in range(2)]
    untouched = copy.deepcopy(rows)
    batch = LatentDataCollator(processor)(rows)
    start, pad, end = processor.latent_token_ids
    eos = processor.tokenizer.eos_token_id
    assert len(batch["helper_image_lengths"]) == 3 and len(batch["image_lengths"]) == 2
    images = batch["input_ids"] == processor.placeholder_id
    assert images.sum() == batch["image_lengths"].sum()
    starts = (batch["input_ids"] == start).nonzero().tolist()
    assert starts[0][1] == starts[1][1]  # first spans in one column
    for row in range(2):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][real], batch["shift_labels"][row][real]
        assert ids.tolist() == untouched[row]["input_ids"]
        in_turn = torch.tensor(untouched[row]["assistant_mask"])
        for t in range(len(ids) - 1):
            counted = in_turn[t + 1] and ids[t + 1] != pad
            assert labels[t] == (ids[t + 1] if counted else -100)
        assert start in labels and end in labels and pad not in labels and eos in labels
        assert (batch["shift_labels"][row][~real] == -100).all()
    assert rows[0].keys() == untouched[0].keys()  # inputs not mutated


def test_padding_between_words_does_not_change_the_loss(model, processor, tmp_path):
    """A row that is padded inside, to align its spans with another's, has the loss that it has alone."""
    samples = [make_sample(["Right", "Up", "Left"]), make_sample(["Right", "Up Down Up Down", "Left"], "Go go")]
    model.eval()
    trainer = make_trainer(model, processor, tmp_path, samples, stage=2, max_steps=1)
    rows = [trainer.train_dataset[i] for i in range(2)]
    collate = trainer.data_collator
    both = trainer.compute_loss(model, collate(rows)).item()
    counts = [sum(collate([row])["shift_labels"].ne(-100).flatten().tolist()) for row in rows]
    single = [trainer.compute_loss(model, collate([row])).item() for row in rows]
    assert (collate(rows)["attention_mask"].diff() == 1).sum() > 1  # padding inside
    assert both == pytest.approx((single[0] * counts[0] + single[1] * counts[1]) / sum(counts), rel=1e-5)


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


def test_grouped_batches_are_alike_and_in_random_order():
    rng = random.Random(0)
    num_spans = [rng.randint(0, 5) for _ in range(403)]
    lengths = [rng.randint(50, 90) for _ in range(403)]
    sampler = SpanGroupedSampler(num_spans, lengths, batch_size=4, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(403)) and len(sampler) == 403
    batches = [order[i : i + 4] for i in range(0, 403, 4)]
    spread = sum(max(num_spans[i] for i in b) - min(num_spans[i] for i in b) for b in batches[:-1])
    assert spread < 0.2 * len(batches)
    firsts = [num_spans[b[0]] for b in batches[:-1]]
    assert sum(a < b for a, b in pairwise(firsts)) > 20 and sum(a > b for a, b in pairwise(firsts)) > 20
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_grouped_training_draws_another_order_each_epoch(model, processor, tmp_path):
    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        max_steps=4,
        train_sampling_strategy="group_by_length",
        learning_rate=0.0,
        data_seed=0,
    )
    seen = []
    collate = trainer.data_collator.torch_call
    trainer.data_collator.torch_call = lambda rows: (
        seen.append([len(row["input_ids"]) for row in rows]) or collate(rows)
    )
    trainer.train()
    sampler = trainer.get_train_dataloader().batch_sampler.sampler
    assert isinstance(sampler, SpanGroupedSampler) and sampler.seed == 0
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        lengths = [trainer.train_dataset[i]["length"] for i in sampler]
        epochs += [lengths[:4], lengths[4:]]
    assert seen[:4] == epochs


datasets.disable_progress_bars()
