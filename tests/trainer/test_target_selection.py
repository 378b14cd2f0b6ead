"""The selector that trainer, pictures and audits ask."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from helpers import SAMPLES, WORDS, encode, generate, make_dataset, make_sample, make_trainer, perturb

from ilvr import ILVRForConditionalGeneration
from ilvr.trainer import ILVRTrainer, ILVRTrainingConfig
from ilvr.trainer.inputs.columns import HELPER_PROMPTS, TARGET_INDICES
from ilvr.trainer.selection import SELECTORS, Selector, select_uniform
from ilvr.trainer.watching.selection_drawing import compare_latents


ASKED = {"helper_question": "Up Left Down", "max_helper_answer_tokens": 2}
LARGE = [make_sample([WORDS[(i + j) % 4] for j in range(2 + i % 3)], f"Plan {i}", size=64) for i in range(4)]


def follow(samples, patches=(3, 1, 0)) -> list[dict]:
    """Samples whose metadata says which patch of each helper image is followed."""
    return [{**s, "metadata": json.dumps({"followed": list(patches)[: len(s["images"]) - 1]})} for s in samples]


def selected(model, processor, folder, method, samples=SAMPLES):
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")  # which "attention" needs
    trainer = make_trainer(model, processor, folder, follow(samples), selection_method=method, **ASKED)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    return compare_latents(trainer, batch)[0]


def test_each_method_selects_targets_of_its_own(model, processor, tmp_path):
    """K = 3 of 16 candidates: the baselines always take three."""
    found = {method: selected(model, processor, tmp_path, method, LARGE) for method in SELECTORS}
    for method, selection in found.items():
        for other in found:
            assert method == other or not selection.targets.equal(found[other].targets), (method, other)
        if method in ("mean_pool", "uniform", "random"):
            assert selection.mask.equal(selection.candidate_mask.any(-1, keepdim=True).expand_as(selection.mask))
    assert found["mean_pool"].candidates.equal(found["random"].candidates)


def test_a_name_that_is_no_method_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`selection_method` must be one of .*'uniform'.* got 'unifrom'"):
        ILVRTrainingConfig(str(tmp_path), selection_method="unifrom", use_cpu=True, bf16=False)


def test_a_new_selector_is_a_function_and_a_line(model, processor, tmp_path, monkeypatch):
    """It sees the picture before: the user's image at first, then the helper image of the span before."""
    seen = []

    def select_change(inputs, span, previous):
        before, mask = inputs.picture_before(span)
        seen.append((span, before, mask, previous))
        return select_uniform(inputs, span)

    monkeypatch.setitem(SELECTORS, "change", Selector(select_change))
    selection = selected(model, processor, tmp_path, "change")
    assert [span for span, *_ in seen] == list(range(selection.mask.shape[1]))
    assert seen[0][3] is None and seen[1][3].targets.equal(selection.targets[:, 0])
    assert seen[1][1].equal(selection.candidates[:, 0])
    # All samples show the same picture to the user; 2 x 2 tokens.
    first, mask = seen[0][1:3]
    assert mask.all() and first.shape == (4, 4, 32) and first[0].equal(first[3])
    image = processor.image_processor([SAMPLES[0]["images"][0]], return_tensors="pt")
    expected = model.get_image_features(**image, return_dict=True).pooler_output[0]
    torch.testing.assert_close(first[0], expected)


def test_baselines_take_no_forward_of_the_teacher(model, processor, tmp_path):
    calls = []
    for method in SELECTORS:
        settings = {"selection_method": method, "max_steps": 1, **ASKED}
        model.set_attn_implementation("eager")
        trainer = make_trainer(copy.deepcopy(model), processor, tmp_path, follow(SAMPLES), **settings)
        trainer.teacher.model.register_forward_hook(lambda *_, method=method: calls.append(method))
        trainer.train()
    asking = {method for method, selector in SELECTORS.items() if selector.reads_teacher or selector.asks_teacher}
    assert set(calls) == asking and calls.count("query_top_p") == 2  # the norm of latents, and the step


# -------------------------------------------------------------------------------------------- what the data says


@pytest.mark.parametrize("cache_images", [False, True])
@pytest.mark.parametrize("max_candidates", [256, 2])
def test_the_oracle_selects_what_is_followed(model, processor, tmp_path, cache_images, max_candidates):
    """One target a span, the patch of the row's metadata, or the group of two that it is in."""
    samples = follow([*SAMPLES[:3], make_sample(["Right"])])
    settings = {"selection_method": "followed", "cache_images": cache_images, "max_candidates": max_candidates}
    settings["unselected_slots"] = "pad"
    trainer = make_trainer(model, processor, tmp_path, samples, max_steps=1, **settings)
    selection = trainer.select_targets(trainer._batch_of(list(trainer.train_dataset)))
    expected = [[3], [3, 1], [3, 1, 0], []]
    for row, patches in enumerate(expected):
        assert selection.mask[row].sum(-1).tolist() == [1] * len(patches) + [0] * (3 - len(patches))
        found = selection.indices[row, : len(patches), 0].tolist()
        assert found == [patch if max_candidates == 256 else patch // 2 for patch in patches]
    trainer.train()
    assert trainer.state.log_history[0]["followed_share"] == 1.0


def test_share_of_spans_that_hold_what_is_followed(model, processor, tmp_path):
    """ "uniform" takes patches 0, 1 and 2 of four. One row says nothing, and does not count."""
    samples = [*follow(SAMPLES[:2], [3, 1]), *follow(SAMPLES[2:3], [0, 3, 3]), {**SAMPLES[3], "metadata": "{}"}]
    settings = {"selection_method": "uniform", "max_steps": 1}
    trainer = make_trainer(copy.deepcopy(model), processor, tmp_path, samples, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["followed_share"] == pytest.approx(2 / 6)
    trainer = make_trainer(model, processor, tmp_path, [{**s, "metadata": "{}"} for s in SAMPLES], **settings)
    trainer.train()
    assert "followed_share" not in trainer.state.log_history[0]


def test_rows_that_do_not_say_what_is_followed_are_refused(model, processor, tmp_path):
    followed = {"selection_method": "followed"}
    with pytest.raises(ValueError, match="Sample 0 of the train data has 1 helper images and .* followed=None. Give"):
        make_trainer(model, processor, tmp_path, **followed)
    with pytest.raises(ValueError, match=r"Sample 1 .* 2 helper images and its metadata says followed=\[0\]. Give a"):
        make_trainer(model, processor, tmp_path, [*follow(SAMPLES[:1]), *follow(SAMPLES[1:2], [0])])
    trainer = make_trainer(model, processor, tmp_path, follow(SAMPLES, [4, 0, 0]), **followed)
    with pytest.raises(ValueError, match="Helper image 0 of a batch has 4 patches, and .* names patch 4. Count"):
        trainer.train()


# ------------------------------------------------------------------------------------------- once, before training


MIXED = [*SAMPLES[:5], make_sample(["Right"])]  # of one to three helper images, and none


@pytest.mark.parametrize("method", ["query_top_p", "answer_gradient", "change"])
@pytest.mark.parametrize("cache_images", [False, True])
def test_what_is_selected_once_is_what_the_first_step_selects(model, processor, tmp_path, method, cache_images):
    settings = {"selection_method": method, "cache_images": cache_images, "selection_temperature": 0.3, **ASKED}
    stepwise = make_trainer(copy.deepcopy(model), processor, tmp_path, MIXED, **settings)
    once = make_trainer(model, processor, tmp_path, MIXED, selection_schedule="once", **settings)
    # One row at a time: what is padded along must not matter.
    for row, known in zip(stepwise.train_dataset, once.train_dataset, strict=True):
        expected = stepwise.select_targets(stepwise._batch_of([row]))
        found = once.select_targets(once._batch_of([known]))
        if expected is None:
            assert found is None and known[TARGET_INDICES] == []
            continue
        torch.testing.assert_close(found.targets, expected.targets)
        assert found.mask.equal(expected.mask) and known[TARGET_INDICES] == [
            span[mask].tolist() for span, mask in zip(expected.indices[0], expected.mask[0])
        ]
        assert found.candidates.equal(expected.candidates) and HELPER_PROMPTS not in known


def test_what_was_selected_once_stays_while_the_teacher_moves(model, processor, tmp_path):
    settings = {"teacher_decay": 0.0, "max_steps": 2, "selection_method": "answer_gradient", **ASKED}
    found = {}
    for schedule in ("step", "once"):
        trainer = make_trainer(
            copy.deepcopy(model), processor, tmp_path / schedule, selection_schedule=schedule, **settings
        )
        batch = trainer._batch_of([trainer.train_dataset[i] for i in range(4)])
        before = trainer.select_targets(batch).targets
        trainer.train()
        found[schedule] = before.equal(trainer.select_targets(batch).targets)
    assert found == {"step": False, "once": True}


def test_what_was_selected_once_is_found_again(model, processor, tmp_path, monkeypatch):
    """By data, weights and settings; other weights and other settings select anew."""
    dataset = Dataset.from_generator(lambda: iter(SAMPLES), features=make_dataset().features)
    calls = []
    batch_of = ILVRTrainer._batch_of
    monkeypatch.setattr(ILVRTrainer, "_batch_of", lambda *args: calls.append(args) or batch_of(*args))

    def start(model, **settings):
        calls.clear()
        make_trainer(model, processor, tmp_path, dataset=dataset, selection_schedule="once", **settings)
        return len(calls)

    assert start(copy.deepcopy(model)) and not start(copy.deepcopy(model)) and not start(model, learning_rate=1.0)
    assert start(copy.deepcopy(model), selection_top_p=0.3) and start(copy.deepcopy(model), unselected_slots="pad")
    assert start(copy.deepcopy(model), selection_method="change")
    assert start(perturb(model, scale=1e-3))


@pytest.mark.parametrize("cache_images", [False, True])
def test_a_run_that_selects_once_resumes_exactly(model, processor, tmp_path, cache_images):
    settings = {"selection_method": "answer_gradient", "selection_schedule": "once", "max_steps": 4, **ASKED}
    settings |= {"cache_images": cache_images, "teacher_decay": 0.9}
    whole_model, first_model = copy.deepcopy(model), copy.deepcopy(model)
    make_trainer(whole_model, processor, tmp_path / "a", **settings).train()
    make_trainer(first_model, processor, tmp_path / "b", save_strategy="steps", save_steps=2, **settings).train()
    resumed = make_trainer(model, processor, tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (name, a), b in zip(whole_model.named_parameters(), model.parameters()):
        assert a.equal(b), name


def test_what_cannot_be_selected_once_or_asked_is_refused(model, processor, tmp_path, monkeypatch):
    stream = make_dataset().to_iterable_dataset()
    with pytest.raises(ValueError, match="selection_schedule='once' needs all data at hand; set it to 'step'"):
        make_trainer(model, processor, tmp_path, dataset=stream, selection_schedule="once")
    with pytest.raises(ValueError, match="keeps which candidates are targets, and 'mean_pool' makes new ones"):
        make_trainer(model, processor, tmp_path, selection_schedule="once", selection_method="mean_pool")
    cached = make_trainer(copy.deepcopy(model), processor, tmp_path, cache_images=True).train_dataset
    with pytest.raises(ValueError, match="images of the train data are cached, without the questions"):
        make_trainer(model, processor, tmp_path, dataset=cached, selection_method="answer_gradient", **ASKED)
    monkeypatch.setattr("ilvr.trainer.ilvr_trainer.is_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match="lets the teacher generate, which a sharded one cannot. Train with DDP"):
        make_trainer(model, processor, tmp_path, selection_method="answer_gradient", **ASKED)


# ----------------------------------------------------------------------------- what stage 1 feeds and generation feeds


@pytest.mark.parametrize("slots", ["pad", "repeat"])
def test_stage_1_feeds_what_generation_feeds(backbone_dir, processor, tmp_path, slots):
    """Latents of the same norm, and a latent in each slot: with "pad" there are slots that hold none."""
    model = perturb(ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3))
    settings = {"unselected_slots": slots, "selection_method": "change", "selection_top_p": 0.5}
    trainer = make_trainer(model, processor, tmp_path, **settings)
    trainer.measure_latent_norm()
    batch = trainer._batch_of(list(trainer.train_dataset))
    selection = trainer.select_targets(batch)
    targets = {"latent_values": selection.targets, "latent_mask": selection.mask}
    fed = model(**batch.inputs, **targets).latent_inputs[selection.mask.any(-1)]  # (spans, K, D)
    outputs = generate(
        model.eval(),
        encode(processor, SAMPLES[:3], "left", prompt_only=True),
        output_latents=True,
        return_dict_in_generate=True,
    )
    own = torch.cat(outputs.latents)
    padding = model.get_input_embeddings().weight[model.config.latent_pad_token_id]
    is_pad = (fed == padding).all(-1)
    assert len(own) and is_pad.any() == (slots == "pad") and not (own == padding).all(-1).any()
    norms = fed[~is_pad].norm(dim=-1)
    torch.testing.assert_close(own.norm(dim=-1), norms.mean().expand(own.shape[:-1]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("scale", "warned"), [(100, True), (1e-3, True), (None, False)])
def test_latents_of_another_length_are_warned_of(model, processor, tmp_path, monkeypatch, scale, warned):
    messages, model.config.latent_head = [], "identity"
    monkeypatch.setattr("ilvr.trainer.ilvr_trainer.logger.warning_once", messages.append)
    if scale is None:
        model.config.latent_head = "rescale"
    else:
        with torch.no_grad():
            model.model.core.get_decoder().norm.weight.mul_(scale)
    trainer = make_trainer(model, processor, tmp_path, max_steps=1)
    trainer.train()
    ratio = trainer.state.log_history[0]["latent_norm_ratio"]
    assert (0.5 < ratio < 2) != warned
    remedies = [message for message in messages if f"{ratio:.3g} times as long" in message]
    assert bool(remedies) == warned and all("latent_head='rescale'" in message for message in remedies)
