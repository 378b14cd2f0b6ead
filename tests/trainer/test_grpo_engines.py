"""GRPO in two processes over gloo: the same losses and weights as one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_grpo_run import run
from helpers import perturb
from safetensors.torch import load_file

from ilvr import ILVRForConditionalGeneration


@pytest.mark.slow
def test_two_processes_train_like_one(backbone_dir, processor, tmp_path):
    """With a latent head that has weights, ranks whose rollouts have no span, and a reference."""
    model = ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3, latent_head="linear")
    for part in (perturb(model, scale=0.1), processor):
        part.save_pretrained(tmp_path / "model")
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    run(str(tmp_path / "model"), str(alone), batch_size=4)
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (tests, tests.parent / "examples")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = subprocess.run(
        [*command, str(tests / "distributed_grpo_run.py"), str(tmp_path / "model"), str(together)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr[-20000:]
    one, two = (json.loads((folder / "facts.json").read_text()) for folder in (alone, together))
    assert two["wrapper"] == "DistributedDataParallel"
    names = {"loss", "grad_norm", "kl", "entropy", "reward", "num_tokens"}
    for step, (log, other) in enumerate(zip(two["log"][:-1], one["log"][:-1], strict=True)):
        for name in names:
            assert log[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7), (step, name)
    assert one["log"][3]["kl"] > 0
    weights = load_file(together / "weights.safetensors")
    for name, weight in load_file(alone / "weights.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6, msg=name)
