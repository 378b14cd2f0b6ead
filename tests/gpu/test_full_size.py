"""Random checkpoints of published sizes, in bf16 on a GPU: training steps of all kinds, and generation in batches.

python -m pytest -m gpu tests/gpu -s
"""

import gc
import math

import pytest
import torch
from peft import LoraConfig
from transformers.generation import LogitsProcessorList

from benchmarks.model import Workload, make_batch, make_trainer
from benchmarks.sides import Script, split_at_answer
from benchmarks.sizes import build
from ilvr import ILVRForConditionalGeneration, ILVRProcessor


pytestmark = pytest.mark.gpu
LATENTS = 8
WORK = Workload(spans=2, batch=2)


@pytest.fixture(scope="module", params=["qwen2_5_vl_3b", "qwen3_vl_4b"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    build(folder, request.param)
    return folder


def load(folder, **options):
    options = {"latent_size": LATENTS, "device_map": "cuda", "dtype": torch.bfloat16, **options}
    model = ILVRForConditionalGeneration.from_backbone(folder, **options)
    return model, ILVRProcessor.from_backbone(folder, latent_size=LATENTS)


@pytest.fixture(autouse=True)
def freed_memory():
    yield
    gc.collect()
    torch.cuda.empty_cache()


KINDS = {
    "stage 1": {"stage": 1},
    "stage 1, checkpointing": {"stage": 1, "activation_checkpointing": True},
    "stage 1, LoRA": {"stage": 1, "lora": True},
    "stage 2": {"stage": 2},
    "stage 2, checkpointing": {"stage": 2, "activation_checkpointing": True},
    "stage 2, LoRA": {"stage": 2, "lora": True},
    "stage 2, in parallel": {"stage": 2, "jacobi_iterations": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_steps(folder, kind, tmp_path):
    settings = dict(KINDS[kind])
    model, processor = load(folder)
    lora = LoraConfig(r=32, target_modules=["q_proj", "v_proj"]) if settings.pop("lora", False) else None
    settings |= {"bf16": True, "learning_rate": 1e-4, "teacher_decay": 0.9, "max_steps": 3, "logging_steps": 1}
    trainer = make_trainer(
        model, processor, WORK, settings.pop("stage"), tmp_path, copies=3, peft_config=lora, **settings
    )
    # Matrices: in bf16 a step of 1e-4 is below the rounding of a norm's weights, which are 1.
    matrices = {name: p for name, p in trainer.student.named_parameters() if p.requires_grad and p.ndim > 1}
    before = {name: float(p.detach().double().sum()) for name, p in matrices.items()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3 and all(math.isfinite(entry["loss"]) for entry in logs)
    assert logs[-1]["loss"] < logs[0]["loss"]  # three times the same batch
    moved = [name for name, own in before.items() if float(matrices[name].detach().double().sum()) != own]
    assert len(moved) > 0.9 * len(before)
    if trainer.args.stage == 1:
        assert 0 < logs[-1]["teacher_distance"] < 1
    print(f"{kind}: {logs[-1].get('gpu_memory_gib', 0):.1f} GiB, losses {[round(entry['loss'], 3) for entry in logs]}")


@pytest.mark.parametrize("stage", [1, 2])
def test_losses_are_those_of_fp32(folder, stage, tmp_path):
    def loss(dtype):
        model, processor = load(folder, dtype=dtype)
        trainer = make_trainer(model.train(), processor, WORK, stage, tmp_path / str(dtype), bf16=False)
        with torch.no_grad():
            return float(trainer.compute_loss(trainer.student, make_batch(trainer)))

    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        losses.append(loss(dtype))
        gc.collect()
    print(f"stage {stage}: bf16 {losses[0]:.4f}, fp32 {losses[1]:.4f}")
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def scripted(batch) -> tuple[dict, dict]:
    """The prompts of a batch, and settings in which `generate` says the first row's answer and returns latents."""
    prompt, answer = split_at_answer(batch)
    script, steps = LogitsProcessorList([Script(prompt["input_ids"].shape[1], answer)]), len(answer)
    settings = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "logits_processor": script}
    return prompt, settings | {"output_latents": True, "return_dict_in_generate": True}


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("flash_attention_2", torch.bfloat16)],
)
def test_a_batch_is_generated_as_its_rows_are(folder, implementation, dtype, tmp_path):
    """All latents in fp32; in bf16 the first one, for a random model carries its rounding into those that follow."""
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    model, processor = load(folder, attn_implementation=implementation, dtype=dtype)
    trainer = make_trainer(model, processor, Workload(spans=2, batch=4), 2, tmp_path)
    model = trainer.student.eval()
    prompt, settings = scripted(make_batch(trainer))
    one = {name: value[: len(value) // 4] for name, value in prompt.items()}
    alone, together = model.generate(**one, **settings).latents, model.generate(**prompt, **settings).latents
    assert len(together) == 4 and together[0].shape == (2, LATENTS, model.config.get_text_config().hidden_size)
    for row in together:
        similarity = torch.cosine_similarity(row.float(), alone[0].float(), dim=-1)  # (spans, K)
        print(f"{implementation}, {dtype}: similarity of latents {similarity.flatten().tolist()}")
        assert similarity[0, 0] > 0.99
        assert dtype == torch.bfloat16 or similarity.min() > 0.999


def test_a_compiled_step_has_the_latents_of_an_eager_one(folder, tmp_path):
    """A static cache on a GPU: transformers compiles the step and records it as a CUDA graph."""
    model, processor = load(folder, dtype=torch.float32)
    trainer = make_trainer(model, processor, Workload(spans=2, batch=4), 2, tmp_path)
    model = trainer.student.eval()
    prompt, settings = scripted(make_batch(trainer))
    settings["cache_implementation"] = "static"
    eager = model.generate(**prompt, **settings, disable_compile=True).latents
    for _ in range(2):  # recorded in the first, replayed in the second
        for found, expected in zip(model.generate(**prompt, **settings).latents, eager, strict=True):
            similarity = torch.cosine_similarity(found, expected, dim=-1)  # (spans, K)
            assert similarity.min() > 0.999, similarity
