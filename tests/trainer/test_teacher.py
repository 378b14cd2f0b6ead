"""The momentum teacher."""

import pytest
import torch
from backbones import FULLY_TESTED
from helpers import make_trainer

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


def test_teacher_equals_the_student_at_first(model):
    teacher = MomentumTeacher(model.model, 0.999)
    assert teacher.distance(model.model) == 0.0
