"""GRPO in two processes over gloo: the same losses and weights as one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from distributed_grpo_run import run
from helpers import perturb, untie
from safetensors.torch import load_file

from ilvr import ILVRForConditionalGeneration


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
RUNS = {
    "recompute": {},
    "replay": {"latent_policy": "replay"},
    "adapter": {"lora": True, "untied": True},
    "synced": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
}
SAVED = {"saved": {"save_strategy": "steps", "save_steps": 2}}
RESUMED = {"resumed": {**SAVED["saved"], "resume": 2}}
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP"}
CASES = [(engine, name) for engine in WRAPPERS for name in RUNS if (engine, name) != ("fsdp2", "adapter")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, backbone_dir, processor):
    """A tiny model with tied and one with untied embeddings, both with a latent head that has weights."""
    folders = {}
    for untied in (False, True):
        model = ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3, latent_head="linear")
        if untied:
            untie(model)
        folders[untied] = str(tmp_path_factory.mktemp("model"))
        for part in (perturb(model, scale=0.1), processor):
            part.save_pretrained(folders[untied])
    return folders


def settings_of(name: str, folders: dict) -> dict:
    settings = dict((RUNS | SAVED | RESUMED)[name])
    return {"folder": folders[settings.pop("untied", False)], **settings}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, folders):
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        run(name, folder, batch_size=4, use_cpu=True, **settings_of(name, folders))
    return folder


def environment(engine: str) -> dict:
    if engine == "ddp":
        return {"ACCELERATE_USE_CPU": "true"}
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    settings = {key.upper(): str(value) for key, value in config["fsdp_config"].items()}
    return {"ACCELERATE_USE_FSDP": "true", **settings}


@pytest.fixture(scope="module")
def together(tmp_path_factory, folders):
    """Launches an engine once, with all runs, and gives the folder of what they left."""
    done = {}

    def run_all(engine: str) -> Path:
        if engine not in done:
            folder = done[engine] = tmp_path_factory.mktemp(engine)
            common = {"batch_size": 2, "use_cpu": engine == "ddp"}
            runs = {name: {**common, **settings_of(name, folders)} for name in RUNS | SAVED | RESUMED}
            if engine == "fsdp2":
                del runs["adapter"]  # refused
            (folder / "runs.json").write_text(json.dumps(runs))
            tests = Path(__file__).parents[1]
            paths = os.pathsep.join(map(str, (tests, tests.parent / "examples")))
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
            script = [str(tests / "distributed_grpo_run.py"), str(folder / "runs.json"), str(folder)]
            launched = subprocess.run(
                [*torchrun, "--standalone", *script],
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment(engine)},
                capture_output=True,
                text=True,
                timeout=480,
            )
            assert launched.returncode == 0, launched.stderr[-20000:]
        return done[engine]

    return run_all


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_two_processes_train_like_one(together, alone, engine, name):
    """With ranks whose rollouts have no span, and a reference."""
    one, two = (json.loads((folder / f"{name}.json").read_text()) for folder in (alone, together(engine)))
    assert two["wrapper"].startswith(WRAPPERS[engine])
    keys = {"loss", "grad_norm", "kl", "entropy", "reward", "num_tokens"}
    for step, (log, other) in enumerate(zip(two["log"][:-1], one["log"][:-1], strict=True)):
        for key in keys:
            assert log[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), (step, key)
    assert one["log"][-2]["kl"] > 0
    found, weights = (load_file(folder / f"{name}.safetensors") for folder in (together(engine), alone))
    for key, weight in weights.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-6, msg=key)


def test_a_reference_that_follows_is_nearer(alone):
    logs = [json.loads((alone / f"{name}.json").read_text())["log"] for name in ("recompute", "synced")]
    stays, follows = (log[-2]["kl"] for log in logs)
    assert 0 < follows < stays / 2


@pytest.mark.parametrize("engine", WRAPPERS)
def test_each_rank_generates_as_many_tokens_as_it_needs(together, alone, engine):
    one, two = (json.loads((folder / "recompute.json").read_text()) for folder in (alone, together(engine)))
    tokens, (expected,) = two["tokens"], one["tokens"]
    assert two["gap"] == one["gap"]
    assert len(tokens[1]) == len(tokens[0]) + 3 == len(expected) + 3
    assert tokens[0] == tokens[1][: len(expected)] == expected


@pytest.mark.parametrize("engine", WRAPPERS)
def test_resumed_processes_train_like_uninterrupted_ones(together, engine):
    weights, resumed = (load_file(together(engine) / f"{name}.safetensors") for name in ("saved", "resumed"))
    for key, weight in weights.items():
        torch.testing.assert_close(resumed[key], weight, rtol=1e-6, atol=1e-7, msg=key)
