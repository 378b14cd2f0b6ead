"""AdamW's moments of stage 1 as those that stage 2 starts with."""

import copy
import json

import pytest
import torch
from helpers import make_trainer

from ilvr.trainer.running.optimizer_state import PARAMETERS, parameter_names


SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}


@pytest.fixture
def stage1(model, processor, tmp_path):
    """A finished stage 1, its folder, and a model with its weights that no trainer has touched."""
    trained = copy.deepcopy(model)
    trainer = make_trainer(trained, processor, tmp_path / "stage1", **SAVES)
    trainer.train()
    model.load_state_dict(trained.state_dict())
    return trainer, tmp_path / "stage1", model


def moments_of(trainer) -> dict[str, dict]:
    names, state = parameter_names(trainer.model, trainer.optimizer), trainer.optimizer.state_dict()["state"]
    return {names[number]: moments for number, moments in state.items()}


@pytest.mark.parametrize("name", ["", "checkpoint-2"])
def test_stage_2_starts_with_the_moments_of_stage_1(stage1, processor, tmp_path, name):
    """Without a step they are equal; its learning rate is its own."""
    trainer, folder, model = stage1
    expected = copy.deepcopy(moments_of(trainer))
    settings = {"stage": 2, "learning_rate": 1e-4, "max_steps": 1}
    other = make_trainer(model, processor, tmp_path / "b", optimizer_state_from=str(folder / name), **settings)
    other.create_optimizer()
    found = {}

    def first_step(*args, **kwargs):
        found.update(copy.deepcopy(moments_of(other)))
        assert {group["lr"] for group in other.optimizer.param_groups} == {1e-4}

    other.optimizer.register_step_pre_hook(first_step)
    other.train()
    assert found.keys() == expected.keys() and len(found) > 10
    for weight, moments in expected.items():
        for part in ("step", "exp_avg", "exp_avg_sq"):
            assert found[weight][part].equal(moments[part]), (weight, part)
    assert all(moments["step"] == 3 for moments in moments_of(other).values())


def test_a_resumed_run_goes_on_with_its_own_moments(stage1, processor, tmp_path):
    _, folder, model = stage1
    settings = {"stage": 2, "optimizer_state_from": str(folder), "save_strategy": "steps", "save_steps": 1}
    start = copy.deepcopy(model)
    whole = make_trainer(model, processor, tmp_path / "b", max_steps=2, **settings)
    whole.train()
    resumed = make_trainer(start, processor, tmp_path / "b", max_steps=2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-1"))
    for (name, a), b in zip(model.named_parameters(), start.parameters()):
        assert a.equal(b), name
    assert moments_of(whole).keys() == moments_of(resumed).keys()


def test_what_does_not_fit_is_refused(stage1, processor, tmp_path):
    _, folder, model = stage1
    checkpoint = folder / "checkpoint-2"

    def start(source=checkpoint, **settings):
        settings = {"stage": 2, "max_steps": 1, "optimizer_state_from": str(source), **settings}
        return make_trainer(copy.deepcopy(model), processor, tmp_path / "b", **settings)

    with pytest.raises(ValueError, match="optimizer_state_from='.*nowhere': there is no such folder. Name a"):
        start(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"weights and \d+ are trained now, .*Freeze the same parts"):
        start(freeze_vision_tower=False).train()
    names = json.loads((checkpoint / PARAMETERS).read_text())
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    first = optimizer["state"][0]
    (checkpoint / "checkpoint_manifest.json").unlink()
    first["exp_avg"] = first["exp_avg"][:1]
    torch.save(optimizer, checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match=rf"{names[0]} has shape \(1, .* another model"):
        start().train()
    first["momentum_buffer"] = first.pop("exp_avg")
    torch.save(optimizer, checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match="'momentum_buffer'.* not AdamW's"):
        start().train()
    (checkpoint / PARAMETERS).unlink()
    with pytest.raises(ValueError, match="optimizer_parameters.json is missing"):
        start()
    with pytest.raises(ValueError, match="it holds no whole checkpoint. Name a"):
        start(folder)
