"""The config: every field has an effect, and the default that its docstring says."""

import copy
import dataclasses
import re

import pytest
from helpers import (
    make_trainer,
)
from trl import SFTConfig

from ilvr.trainer import ILVRTrainingConfig


def added_fields(config_class) -> set[str]:
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    return {field.name for field in dataclasses.fields(config_class)} - inherited


# A value of each field of ours that must change what a run of three steps logs; `cache_images` changes the data
# instead, and `optimizer_state_from` and `swap_latents` have tests of their own.
VARIED = {
    "stage": 2,
    "freeze_vision_tower": False,
    "teacher_decay": 0.5,
    "selection_method": "uniform",
    "selection_top_p": 0.3,
    "selection_temperature": 5.0,
    "max_candidates": 2,
    "selection_schedule": "once",
    "helper_question": "Plan a path",
    "max_helper_answer_tokens": 1,
    "unselected_slots": "pad",
    "ce_weight": 0.5,
    "alignment_weight": 2.0,
    "alignment_anneal": True,
    "alignment": "infonce",
    "image_dropout": 1.0,
    "image_dropout_schedule": "linear",
    "own_latents": 1.0,
    "alignment_temperature": 1.0,
    "alignment_noise": 1.0,
    "jacobi_iterations": 2,
    "jacobi_gradient_iterations": 1,
    "fixed_point_tolerance": 1.0,
}
ASKED = {"selection_method": "answer_gradient", "helper_question": "Right"}
NEEDS = {
    "helper_question": ASKED,
    "max_helper_answer_tokens": ASKED,
    "unselected_slots": {"selection_top_p": 0.3},
    "alignment_temperature": {"alignment": "infonce"},
    "image_dropout_schedule": {"image_dropout": 1.0},
    "jacobi_iterations": {"stage": 2},
    "jacobi_gradient_iterations": {"stage": 2, "jacobi_iterations": 2},
    "fixed_point_tolerance": {"stage": 2},
}


def log_of(model, processor, folder, **settings) -> list[dict]:
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "selection_temperature": 0.3, **settings}
    trainer = make_trainer(copy.deepcopy(model), processor, folder, **settings)
    trainer.train()
    times = {"step_time", "tokens_per_second", "epoch"}
    return [{name: line[name] for name in line.keys() - times} for line in trainer.state.log_history[:3]]


@pytest.fixture(scope="module")
def plain_logs() -> dict[str, list[dict]]:
    """Of runs without the field in question, by what these need."""
    return {}


@pytest.mark.parametrize("field", VARIED)
def test_every_field_of_the_config_has_an_effect(model, processor, tmp_path, plain_logs, field):
    needed = NEEDS.get(field, {})
    if repr(needed) not in plain_logs:
        first, second = (log_of(model, processor, tmp_path, **needed) for _ in range(2))
        assert first == second  # the control
        plain_logs[repr(needed)] = first
    assert log_of(model, processor, tmp_path, **{**needed, field: VARIED[field]}) != plain_logs[repr(needed)]


def test_each_alignment_is_another_loss(model, processor, tmp_path):
    logs = [log_of(model, processor, tmp_path, alignment=name) for name in ("cosine", "infonce", "centred")]
    losses = [log[0]["alignment_loss"] for log in logs]
    assert len(set(losses)) == 3 and len({log[0]["latent_cosine"] for log in logs}) == 1
    with pytest.raises(ValueError, match="'cosine', 'infonce' or 'centred' .* got 'centered'"):
        log_of(model, processor, tmp_path, alignment="centered")


def test_the_list_of_fields_is_complete():
    assert added_fields(ILVRTrainingConfig) == VARIED.keys() | {"cache_images", "optimizer_state_from", "swap_latents"}


def test_defaults_in_the_docstring_are_the_defaults():
    defaults = {field.name: field.default for field in dataclasses.fields(ILVRTrainingConfig)}
    documented = re.findall(r"(\w+) \(`[^)]*\*optional\*, defaults to `?([^`)]+)`?\)", ILVRTrainingConfig.__doc__)
    assert {name for name, _ in documented} == added_fields(ILVRTrainingConfig)
    note = ILVRTrainingConfig.__doc__.split("[!NOTE]")[1].replace("\n    >", "")
    documented += re.findall(r"`(\w+)` `?(True|False|None|\d[\d.e-]*)", note.split(": ", 1)[1])
    assert {"learning_rate", "max_length", "remove_unused_columns"} <= {name for name, _ in documented}
    for name, value in documented:
        found = defaults[name]
        assert value.strip('"') == str(found) or float(value) == found, name
