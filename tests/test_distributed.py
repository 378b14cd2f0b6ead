"""Two processes over gloo: the same losses, weights and teacher as one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import perturb
from distributed_run import run
from safetensors.torch import load_file

from ilvr import ILVRForConditionalGeneration


CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"
# The second of each four has no span, the others have up to three: the ranks' walks and alignment losses are unequal.
WORDS = (["Right", "Up", "Down"], ["Right down"], ["Right", "Up", "Left Left", "Down"], ["Up", "Down"])
SAMPLES = [(words, f"Plan {i}") for i, words in enumerate(WORDS * 2)]
RUNS = {
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "accumulated": {"stage": 1, "gradient_accumulation_steps": 2, "max_steps": 2},
    "checkpointing": {"stage": 2, "activation_checkpointing": True, "untied": True},
    "untied": {"stage": 1, "untied": True},
    "adapter": {"stage": 1, "lora": True, "untied": True},
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
            head = model.vlm.lm_head
            head.weight = torch.nn.Parameter(head.weight.detach() + 0.01)
            for config in (model.config, model.vlm.config, model.config.get_text_config()):
                config.tie_word_embeddings = False
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
    tests = Path(__file__).parent
    paths = os.pathsep.join(map(str, (tests, tests.parent / "examples")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = subprocess.run(
        [*command, str(tests / "distributed_run.py"), str(folder / "runs.json"), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-5000:]


def fsdp_environment() -> dict:
    """What `accelerate launch` makes of the FSDP2 config that is shipped."""
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    settings = {key.upper(): str(value) for key, value in config["fsdp_config"].items()}
    settings["FSDP_TRANSFORMER_CLS_TO_WRAP"] = settings.pop("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP")
    return {"ACCELERATE_USE_FSDP": "true", **settings}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def engine(request, tmp_path_factory, folders):
    folder = tmp_path_factory.mktemp(request.param)
    environment = {"ACCELERATE_USE_CPU": "true"} if request.param == "ddp" else fsdp_environment()
    # Without checkpoints on the way, and then with one that the second half goes on from.
    runs = {name: {**settings_of(name, folders, 1), "use_cpu": request.param == "ddp"} for name in RUNS}
    halves = {**runs["stage1"], "save_strategy": "steps", "save_steps": 2}
    launch({**runs, "saved": halves, "resumed": {**halves, "resume": 2}}, folder, environment)
    return request.param, folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, folders):
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        run(name, folder, **settings_of(name, folders, 2))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_like_one(engine, alone, name):
    engine_name, folder = engine
    facts = json.loads((folder / f"{name}.json").read_text())
    assert facts["wrapper"].startswith({"ddp": "DistributedDataParallel", "fsdp2": "FSDP"}[engine_name])
    expected = json.loads((alone / f"{name}.json").read_text())
    for step, (log, other) in enumerate(zip(facts["log"], expected["log"], strict=True)):
        for key in {"loss", "grad_norm", "teacher_distance"} & other.keys():
            assert log[key] == pytest.approx(other[key], rel=1e-4), (step, key)
    found, weights = (load_file(where / f"{name}.safetensors") for where in (folder, alone))
    assert found.keys() == weights.keys() and any(key.startswith("teacher.") for key in found) == (
        "1" in str(RUNS[name])
    )
    for key, weight in weights.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-6, msg=key)


def test_resumed_processes_train_like_uninterrupted_ones(engine):
    _, folder = engine
    weights, resumed = (load_file(folder / f"{name}.safetensors") for name in ("stage1", "resumed"))
    for key, weight in weights.items():
        torch.testing.assert_close(resumed[key], weight, rtol=1e-6, atol=1e-7, msg=key)
