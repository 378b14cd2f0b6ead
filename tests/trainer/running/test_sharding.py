"""Two processes over gloo: the same losses, weights and teacher as one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import DistributedType
from distributed_run import run
from helpers import every_backbone, perturb, untie
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from ilvr import ILVRConfig, ILVRForConditionalGeneration
from ilvr.trainer.running.adapters import complete_peft_config
from ilvr.trainer.running.sharding import prepare_sharding


CONFIGS = Path(__file__).parents[3] / "examples" / "accelerate"
# The second of each four has no span, the others have up to three: the ranks' walks and alignment losses are unequal.
WORDS = (["Right", "Up", "Down"], ["Right down"], ["Right", "Up", "Left Left", "Down"], ["Up", "Down"])
SAMPLES = [(words, f"Plan {i}") for i, words in enumerate(WORDS * 2)]
RUNS = {
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "jacobi": {"stage": 2, "jacobi_iterations": 3, "jacobi_gradient_iterations": 2, "untied": True},
    "fixed_point": {"stage": 2, "fixed_point_tolerance": 1e-6, "untied": True},
    "accumulated": {"stage": 1, "gradient_accumulation_steps": 2, "max_steps": 2},
    "checkpointing": {"stage": 2, "activation_checkpointing": True, "untied": True},
    "untied": {"stage": 1, "untied": True},
    "adapter": {"stage": 1, "lora": True, "untied": True},
    "rescaled": {"stage": 1, "latent_head": "rescale"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, backbone_dir, processor):
    """A tiny model with tied and one with untied embeddings, both with a latent head that has weights."""
    folders = {}
    for untied in (False, True):
        folder = folders[untied] = tmp_path_factory.mktemp("distributed")
        model = perturb(
            ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3, latent_head="linear"), scale=0.1
        )
        if untied:
            untie(model)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folders


def settings_of(name: str, folders: dict, batch_size: int) -> dict:
    settings = dict(RUNS[name])
    folder = str(folders[settings.pop("untied", False)])
    common = {"max_steps": 4, "teacher_decay": 0.9, "per_device_train_batch_size": batch_size}
    return {"folder": folder, "samples": SAMPLES, **common, **settings}


def launch(runs: dict, folder: Path, environment: dict):
    """Runs `distributed_run.py` in two processes."""
    (folder / "runs.json").write_text(json.dumps(runs))
    tests = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (tests, tests.parent / "examples")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = subprocess.run(
        [*command, str(tests / "distributed_run.py"), str(folder / "runs.json"), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-20000:]


def fsdp_environment() -> dict:
    """What `accelerate launch` makes of the FSDP2 config that is shipped."""
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    settings = {key.upper(): str(value) for key, value in config["fsdp_config"].items()}
    return {"ACCELERATE_USE_FSDP": "true", **settings}


def deepspeed_environment(stage: int) -> dict:
    """What `accelerate launch` makes of a DeepSpeed config that is shipped."""
    config = yaml.safe_load((CONFIGS / f"deepspeed_zero{stage}.yaml").read_text())["deepspeed_config"]
    assert config["zero_stage"] == stage
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": str(config.get("zero3_save_16bit_model", False)).lower(),
        "ACCELERATE_GRADIENT_CLIPPING": str(config["gradient_clipping"]),
        "DS_ACCELERATOR": "cpu",
    }


ENGINES = {
    "ddp": ("DistributedDataParallel", list(RUNS)),
    "fsdp2": ("FSDP", [name for name in RUNS if name != "fixed_point"]),  # which a sharded model refuses
    "zero2": ("DeepSpeedEngine", ["stage1", "stage2", "untied"]),
    "zero3": ("DeepSpeedEngine", ["stage2", "checkpointing", "jacobi"]),
}
CASES = [
    pytest.param(engine, name, marks=[pytest.mark.slow] if "zero" in engine else [])
    for engine, (_, names) in ENGINES.items()
    for name in names
]


@pytest.fixture(scope="module")
def results(tmp_path_factory, folders):
    """Launches an engine once, with all its runs, and gives the folder of what they left."""
    done = {}

    def run_all(engine: str) -> Path:
        if engine not in done:
            if "zero" in engine:
                pytest.importorskip("deepspeed")
                environment = deepspeed_environment(int(engine[-1]))
            else:
                environment = {"ACCELERATE_USE_CPU": "true"} if engine == "ddp" else fsdp_environment()
            runs = {n: {**settings_of(n, folders, 1), "use_cpu": engine == "ddp"} for n in ENGINES[engine][1]}
            if "zero" not in engine:
                saved = {**runs["rescaled"], "save_strategy": "steps", "save_steps": 2}
                runs |= {"saved": saved, "resumed": {**saved, "resume": 2}}
            folder = tmp_path_factory.mktemp(engine)
            launch(runs, folder, environment)
            done[engine] = folder
        return done[engine]

    return run_all


@pytest.fixture(scope="module")
def alone(tmp_path_factory, folders):
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        run(name, folder, **settings_of(name, folders, 2))
    return folder


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_two_processes_train_like_one(results, alone, engine, name):
    folder = results(engine)
    facts = json.loads((folder / f"{name}.json").read_text())
    assert facts["wrapper"].startswith(ENGINES[engine][0])
    expected = json.loads((alone / f"{name}.json").read_text())
    for step, (log, other) in enumerate(zip(facts["log"], expected["log"], strict=True)):
        for key in {"loss", "grad_norm", "teacher_distance"} & other.keys():
            assert log[key] == pytest.approx(other[key], rel=1e-4), (step, key)
    found, weights = (load_file(where / f"{name}.safetensors") for where in (folder, alone))
    assert found.keys() == weights.keys()
    assert any(key.startswith("teacher.") for key in found) == (RUNS[name]["stage"] == 1)
    for key, weight in weights.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-6, msg=key)
    if not RUNS[name].get("lora"):
        saved = ILVRForConditionalGeneration.from_pretrained(folder / name)
        for key, parameter in saved.named_parameters():
            torch.testing.assert_close(parameter.data, found[key], msg=key)
        trained = ILVRConfig.from_pretrained(alone / name)
        assert saved.config.latent_norm == pytest.approx(trained.latent_norm, rel=1e-5)
        assert (trained.latent_norm != 1) == (name == "rescaled")
    else:
        adapter = load_file(folder / name / "adapter_model.safetensors")
        trained = [key for key in found if "lora_" in key and not key.startswith("teacher.")]
        assert len([key for key in adapter if "lora_" in key]) == len(trained)
        for key, weight in adapter.items():
            if "lora_" in key:
                ours = key.removeprefix("base_model.model.").replace(".weight", ".default.weight")
                torch.testing.assert_close(weight, found[ours], msg=key)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_resumed_processes_train_like_uninterrupted_ones(results, engine):
    weights, resumed = (load_file(results(engine) / f"{name}.safetensors") for name in ("rescaled", "resumed"))
    for key, weight in weights.items():
        torch.testing.assert_close(resumed[key], weight, rtol=1e-6, atol=1e-7, msg=key)


def fake_accelerator(*, fsdp_version=None, zero_stage=None, cpu_ram_efficient_loading=False):
    fsdp = SimpleNamespace(
        cpu_ram_efficient_loading=cpu_ram_efficient_loading, ignored_modules=None, transformer_cls_names_to_wrap=None
    )
    state = SimpleNamespace(
        fsdp_plugin=fsdp, deepspeed_plugin=None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    )
    kind = DistributedType.FSDP if fsdp_version else DistributedType.DEEPSPEED
    return SimpleNamespace(distributed_type=kind, is_fsdp2=fsdp_version == 2, state=state, device="cpu")


@pytest.mark.parametrize(
    ("settings", "freeze", "message"),
    [
        ({"fsdp_version": 1}, True, "fsdp_version: 2"),
        ({"fsdp_version": 2}, False, "freeze_vision_tower=True"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, True, "cpu_ram_efficient_loading"),
        ({"zero_stage": 3}, True, "ZeRO-3 has no way .* Use FSDP2"),
    ],
)
def test_settings_that_cannot_train_stage_1_are_refused(model, settings, freeze, message):
    options = {"keeps_teacher": True, "freeze_vision_tower": freeze}
    with pytest.raises(ValueError, match=message):
        prepare_sharding(fake_accelerator(**settings), model.model, **options)


def test_rows_of_tied_embeddings_under_fsdp2_are_refused(model):
    peft_config = complete_peft_config(LoraConfig(target_modules="all-linear"), model, freeze_vision=True)
    student = get_peft_model(model, peft_config).get_base_model()
    with pytest.raises(ValueError, match="tied embeddings .* with DDP"):
        prepare_sharding(
            fake_accelerator(fsdp_version=2), student.model, keeps_teacher=False, freeze_vision_tower=True
        )


@every_backbone
def test_the_layers_of_any_decoder_are_sharded(model, backbone_name):
    """By name, and one at a time; the config of accelerate names none."""
    accelerator = fake_accelerator(fsdp_version=2)
    prepare_sharding(accelerator, model.model, keeps_teacher=True, freeze_vision_tower=True)
    names = accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap
    decoder = model.model.core.get_decoder()
    wrapped = [module for module in decoder.modules() if type(module).__name__ in names]
    assert wrapped == list(decoder.layers) and len(names) == 1
