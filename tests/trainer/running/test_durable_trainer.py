"""What every trainer of ILVR models shares, and what goes wrong in a run."""

import copy
import json

import pytest
import torch
from helpers import SAMPLES, make_dataset, make_trainer
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from ilvr.trainer import ILVRTrainingConfig
from ilvr.trainer.inputs.data_collator import LatentDataCollator
from ilvr.trainer.inputs.data_preparation import prepare_dataset
from ilvr.trainer.running import durable_trainer
from ilvr.trainer.running.checkpoints import MANIFEST, write_manifest
from ilvr.trainer.running.durable_trainer import DurableTrainer
from ilvr.trainer.teacher import TEACHER_FILE


SAVING = {"save_strategy": "steps", "save_steps": 1}


class WordsTrainer(DurableTrainer, Trainer):
    """The mixin over transformers' own trainer: cross-entropy of the words, through the model's own latents."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw", "labels")
        outputs = model(**{name: inputs[name] for name in names if name in inputs})
        self.record(1, entropy=torch.distributions.Categorical(logits=outputs.logits).entropy().mean())
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def words_trainer(model, processor, folder, **settings):
    shared = {"logging_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "report_to": "none"}
    shared |= {"gradient_accumulation_steps": 1, "bf16": False, "use_cpu": True, "disable_tqdm": True}
    args = ILVRTrainingConfig(str(folder), stage=2, max_steps=4, **SAVING, **shared, **settings)
    dataset = prepare_dataset(make_dataset(SAMPLES), processor, stage=2)
    return WordsTrainer(model, args, train_dataset=dataset, data_collator=LatentDataCollator(processor))


def test_any_trainer_of_transformers_resumes_exactly(model, processor, tmp_path):
    other = copy.deepcopy(model)
    whole = words_trainer(model, processor, tmp_path)
    whole.train()
    resumed = words_trainer(other, processor, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, a), b in zip(model.named_parameters(), other.named_parameters()):
        torch.testing.assert_close(a, b[1], rtol=0, atol=0, msg=name)
    times = {"step_time", "tokens_per_second"}
    for a, b in zip(whole.state.log_history[:2], resumed.state.log_history[:2], strict=True):
        assert a.keys() == b.keys() and all(a[name] == b[name] for name in a.keys() - times) and "entropy" in a


class During(TrainerCallback):
    """Does something once, after the first step."""

    def __init__(self, do):
        self.do = do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.do()


def test_two_runs_cannot_save_to_one_folder(model, processor, tmp_path):
    second = make_trainer(copy.deepcopy(model), processor, tmp_path, max_steps=1, **SAVING)
    refusals = []

    def start_second():
        with pytest.raises(ValueError, match="Another run writes to") as error:
            second.train()
        refusals.append(error)

    make_trainer(model, processor, tmp_path, max_steps=2, callbacks=[During(start_second)], **SAVING).train()
    assert len(refusals) == 1 and not (tmp_path / "checkpoint-2" / "_run.lock").exists()
    second.train()  # the first has ended
    assert second.state.global_step == 1


@pytest.mark.parametrize(
    ("settings", "message"), [({"stage": 2}, "stage 1, not 2"), ({"seed": 4}, "seed 3, not 4")], ids=str
)
def test_a_checkpoint_of_another_run_is_refused(model, processor, tmp_path, settings, message):
    make_trainer(copy.deepcopy(model), processor, tmp_path, max_steps=1, **SAVING).train()
    with pytest.raises(ValueError, match=f"checkpoint-1 is of a run with {message}"):
        make_trainer(model, processor, tmp_path, max_steps=2, **settings).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_one_of_the_weights_is_refused(model, processor, tmp_path):
    make_trainer(copy.deepcopy(model), processor, tmp_path, max_steps=1, **SAVING).train()
    folder = tmp_path / "checkpoint-1"
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "layers.1.mlp" in name)
    save_file({name: w for name, w in weights.items() if name != lost}, folder / "model.safetensors", {"format": "pt"})
    write_manifest(folder, json.loads((folder / MANIFEST).read_text())["settings"])
    with pytest.raises(ValueError, match="lacks 1 weights of the model, .*layers.1.mlp"):
        make_trainer(model, processor, tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_a_teacher_of_another_shape_is_refused(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path)
    trainer.teacher.save(tmp_path)
    weights = load_file(tmp_path / TEACHER_FILE)
    name = next(iter(weights))
    save_file({**weights, name: weights[name].flatten()[:1].clone()}, tmp_path / TEACHER_FILE)
    with pytest.raises(ValueError, match=r"has shape \(1,\), the teacher's"):
        trainer.teacher.load(tmp_path)


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_that_are_not_finite_end_the_run_by_name(model, processor, tmp_path, stage):
    """The backbone would say that image features and image tokens do not match."""
    trainer = make_trainer(model, processor, tmp_path, stage=stage, learning_rate=1e30, max_steps=4)
    with pytest.raises(FloatingPointError, match="is not finite at step [23]. Go on from an older checkpoint"):
        trainer.train()


def test_a_loss_that_is_not_finite_ends_the_run(model, processor, tmp_path, monkeypatch):
    trainer = make_trainer(model, processor, tmp_path, max_steps=2, alignment_weight=float("nan"))
    with pytest.raises(FloatingPointError, match=r"The loss \(nan\) is not finite at step 1"):
        trainer.train()


def test_other_errors_of_a_step_stay_what_they_are(model, processor, tmp_path, monkeypatch):
    trainer = make_trainer(model, processor, tmp_path, max_steps=1)

    def fail(*args, **kwargs):
        raise ValueError("something else")

    monkeypatch.setattr(trainer, "compute_loss", fail)
    with pytest.raises(ValueError, match="something else"):
        trainer.train()


def test_a_run_that_is_stopped_says_how_it_goes_on(model, processor, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(durable_trainer.logger, "warning", messages.append)

    def stop():
        raise KeyboardInterrupt

    trainer = make_trainer(model, processor, tmp_path, max_steps=3, callbacks=[During(stop)], **SAVING)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(messages) == 1 and "Stopped at step 1." in messages[0] and "resume_from_checkpoint=True" in messages[0]
    make_trainer(model, processor, tmp_path, max_steps=1, **SAVING).train()  # the folder is free again


def test_the_data_set_is_named_on_the_card(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, max_steps=1)
    trainer.create_model_card(dataset_name="user/boards")
    assert "datasets: user/boards" in (tmp_path / "README.md").read_text()
