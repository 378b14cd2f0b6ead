"""Images processed once, and kept."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from backbones import FULLY_TESTED
from datasets import Dataset
from helpers import SAMPLES, every_backbone, make_dataset, make_image, make_trainer

from ilvr.trainer import ILVRTrainer
from ilvr.trainer.inputs.image_tensors import encode_helper_images, encode_images, merge_images
from ilvr.trainer.running.adapters import vision_modules


BACKBONES = FULLY_TESTED


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("freeze", [True, False])
def test_caching_images_changes_nothing(model, processor, tmp_path, stage, freeze):
    other = copy.deepcopy(model)
    settings = {"stage": stage, "freeze_vision_tower": freeze, "max_steps": 3}
    plain = make_trainer(model, processor, tmp_path, **settings)
    cached = make_trainer(other, processor, tmp_path, cache_images=True, **settings)
    calls = []
    for trainer in (plain, cached):
        tower = trainer.model.get_submodule(vision_modules(trainer.model)[0])
        tower.register_forward_hook(lambda *_, owner=trainer: calls.append(owner))
        trainer.train()
    assert plain in calls and (cached in calls) == (not freeze)
    for step in range(3):
        a, b = plain.state.log_history[step]["loss"], cached.state.log_history[step]["loss"]
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("backbone_name", ["qwen3_vl"], indirect=True)
def test_a_backbone_without_deepstack_layers(model, processor, tmp_path):
    """Qwen3-VL with an empty `deepstack_visual_indexes`: the cached output holds an empty list, too."""
    tower = model.vlm.model.visual
    tower.deepstack_visual_indexes, tower.deepstack_merger_list = [], torch.nn.ModuleList()
    logs = []
    for cache_images in (False, True):
        trainer = make_trainer(copy.deepcopy(model), processor, tmp_path, cache_images=cache_images, max_steps=1)
        trainer.train()
        logs.append(trainer.state.log_history[0]["loss"])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_features_of_the_same_data_are_found_again(model, processor, tmp_path, monkeypatch):
    """By data, tower and processor: a stage that is started again does not encode, another tower does."""
    dataset = Dataset.from_generator(lambda: iter(SAMPLES), features=make_dataset().features)
    calls = []
    encode = ILVRTrainer._encode_batch
    monkeypatch.setattr(ILVRTrainer, "_encode_batch", lambda *args: calls.append(args) or encode(*args))

    def start(model, **settings):
        calls.clear()
        make_trainer(model, processor, tmp_path, dataset=dataset, cache_images=True, **settings)
        return len(calls)

    assert start(copy.deepcopy(model)) and not start(copy.deepcopy(model)) and not start(copy.deepcopy(model), seed=8)
    assert start(copy.deepcopy(model), stage=2)  # without helper images
    with torch.no_grad():
        next(model.get_submodule(vision_modules(model)[0]).parameters()).add_(1)
    assert start(model)


MEMORY = """
import sys, threading, time
from datasets import Dataset
from helpers import LATENT_SIZE, make_dataset, make_image, make_sample, make_trainer
from ilvr import ILVRForConditionalGeneration, ILVRProcessor
folder, out = sys.argv[1:]
model = ILVRForConditionalGeneration.from_backbone(folder, latent_size=LATENT_SIZE)
processor = ILVRProcessor.from_backbone(folder, latent_size=LATENT_SIZE)

def anonymous():  # without mapped files
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024

peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
for number in (60, 600):
    dataset = make_dataset([make_sample(["Up", f"Down {i}"], size=128) for i in range(number)])
    peak = before = anonymous()
    trainer = make_trainer(model, processor, out, dataset=dataset, cache_images=True, freeze_vision_tower=FREEZE)
    print("grown", peak - before)
"""


@pytest.mark.parametrize("backbone_name", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("freeze", [True, False])
def test_memory_does_not_grow_with_the_data(backbone_dir, tmp_path, freeze):
    """Processed pixels of 600 samples are 230 MB here, two images of 196 kB each."""
    script = MEMORY.replace("FREEZE", str(freeze))
    paths = os.pathsep.join(path for path in sys.path if path.endswith(("tests", "examples")))
    command = [sys.executable, "-c", script, str(backbone_dir), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-2000:]
    few, many = (float(grown) for grown in done.stdout.split("grown ")[1:])  # MB
    assert many < few + 60, (few, many)


@every_backbone
def test_helper_images_of_a_sample_are_as_each_by_itself(processor):
    images = [make_image("red"), make_image("green", 64), make_image("blue")]
    together = encode_helper_images(iter(images), processor)
    alone = merge_images([encode_images([image], processor) for image in images])
    assert together.keys() == alone.keys() and len(together["image_lengths"]) == 3
    for name, tensor in alone.items():
        assert torch.equal(together[name], tensor), name
