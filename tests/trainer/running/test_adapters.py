"""Adapters: the teacher of an adapter, what is trained and saved, merging, and loading from the Hub."""

import copy
import re

import pytest
import torch
from helpers import SAMPLES, encode, make_trainer, perturb
from peft import LoraConfig, PeftModel

from ilvr import ILVRForConditionalGeneration
from ilvr.trainer.running.adapters import complete_peft_config, vision_modules


BACKBONES = ("qwen2_5_vl", "smolvlm")
LATENT_IDS = ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id")


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=True, **kwargs)


def words(model, processor):
    inputs = encode(processor, SAMPLES[:2], "left", prompt_only=True)
    return model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dora", [False, True])
def test_adapter_trains_and_its_teacher_moves(model, processor, tmp_path, stage, dora):
    before = copy.deepcopy(model)
    trainer = make_trainer(model, processor, tmp_path, stage=stage, teacher_decay=0.9, peft_config=lora(use_dora=dora))
    student = trainer.student
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or "trainable_tokens" in name for name in trained)
    assert not any(name.startswith(tuple(vision_modules(student))) for name in trained)
    start = {name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad}
    trainer.train()
    now = dict(student.named_parameters())
    assert all(not now[name].equal(start[name]) for name in trained if "lora_A" not in name or stage == 1)
    wrappers = r"\.(base_layer|original_module|token_adapter)(?=\.)"
    frozen = {re.sub(wrappers, "", name): p for name, p in now.items() if not p.requires_grad}
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(frozen[name], parameter, rtol=0, atol=0, msg=name, check_device=False)
    if stage == 1:
        teacher = {f"model.{name}": p for name, p in trainer.teacher.model.named_parameters()}
        averaged = {f"model.{name}" for name in trainer.teacher.names}
        assert averaged == trained & teacher.keys()
        for name, average in teacher.items():
            assert average is now[name] or name in trained
        assert any(not teacher[name].equal(start[name].float()) for name in averaged)
        assert all(teacher[name].dtype == torch.float32 for name in averaged)
        assert trainer.state.log_history[-2]["teacher_distance"] > 0


def test_frozen_bf16_base_with_adapter_in_fp32(model, processor, tmp_path):
    """As over a quantised base: nothing of the base is cast or copied."""
    model.to(torch.bfloat16)
    trainer = make_trainer(model, processor, tmp_path, peft_config=lora(), bf16=True)
    trainer.train()
    dtypes = {name: p.dtype for name, p in trainer.teacher.model.named_parameters()}
    assert all(dtypes[name] == torch.float32 for name in trainer.teacher.names)
    assert {dtype for name, dtype in dtypes.items() if name not in trainer.teacher.names} == {torch.bfloat16}


def test_rows_of_the_latent_tokens_are_trained_and_no_others(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, stage=2, peft_config=lora(), max_steps=3)
    before = model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    merged = trainer.model.merge_and_unload()
    moved = (merged.get_input_embeddings().weight != before).any(1).nonzero().flatten().tolist()
    assert moved == sorted(getattr(model.config, name) for name in LATENT_IDS)


def test_a_head_of_its_own_is_trained_too(model):
    """Untied, as in the 7B model; what the user asks for is left as it is."""
    model.vlm.lm_head.weight = torch.nn.Parameter(model.vlm.lm_head.weight.detach().clone())
    config = complete_peft_config(lora(), model, freeze_vision=True)
    assert [name.split(".")[-1] for name in config.trainable_token_indices] == ["embed_tokens", "lm_head"]
    asked = complete_peft_config(lora(trainable_token_indices={"embed_tokens": [1]}), model, freeze_vision=True)
    assert asked.trainable_token_indices == {"embed_tokens": [1]}
    saved = complete_peft_config(lora(modules_to_save=["embed_tokens", "lm_head"]), model, freeze_vision=True)
    assert saved.trainable_token_indices is None


def test_a_latent_head_with_weights_is_trained_and_saved(backbone_dir, processor, tmp_path):
    model = ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3, latent_head="linear")
    trainer = make_trainer(perturb(model), processor, tmp_path, peft_config=lora())
    before = copy.deepcopy(model.model.latent_head.state_dict())
    trainer.train()
    trainer.save_model()
    base = perturb(ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3, latent_head="linear"))
    loaded = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    found = loaded.model.latent_head.layers.weight
    assert not found.equal(before[next(name for name in before if name.endswith("weight"))])
    torch.testing.assert_close(found, trainer.model.merge_and_unload().model.latent_head.layers.weight)


def test_saved_adapter_and_merged_checkpoint_answer_alike(model, processor, tmp_path):
    base = copy.deepcopy(model)
    trainer = make_trainer(model, processor, tmp_path / "run", stage=1, peft_config=lora(), max_steps=3)
    trainer.train()
    trainer.save_model()
    expected = words(trainer.model.eval(), processor)
    assert not expected.equal(words(base, processor))
    files = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= files
    assert "model.safetensors" not in files

    base.save_pretrained(tmp_path / "base")
    loaded = ILVRForConditionalGeneration.from_pretrained(tmp_path / "run", backbone=tmp_path / "base").eval()
    assert isinstance(loaded, PeftModel) and loaded.get_base_model().config.latent_norm != base.config.latent_norm
    assert words(loaded, processor).equal(expected)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = ILVRForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert words(plain, processor).equal(expected)
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in base.named_parameters()}


def test_resume_of_an_adapter_equals_an_uninterrupted_run(model, processor, tmp_path):
    settings = {"max_steps": 4, "teacher_decay": 0.9}
    first, resumed_model = copy.deepcopy(model), copy.deepcopy(model)
    whole = make_trainer(model, processor, tmp_path / "a", peft_config=lora(), **settings)
    whole.train()
    make_trainer(
        first, processor, tmp_path / "b", peft_config=lora(), save_strategy="steps", save_steps=2, **settings
    ).train()
    resumed = make_trainer(resumed_model, processor, tmp_path / "b", peft_config=lora(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for one, other in ((whole.student, resumed.student), (whole.teacher.model, resumed.teacher.model)):
        for (name, a), b in zip(one.named_parameters(), other.parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_stage_2_goes_on_from_the_adapter_of_stage_1(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path / "one", peft_config=lora(), max_steps=1)
    trainer.train()
    second = make_trainer(trainer.model, processor, tmp_path / "two", stage=2, max_steps=1)
    second.train()
    assert second.state.log_history[0]["grad_norm"] > 0
