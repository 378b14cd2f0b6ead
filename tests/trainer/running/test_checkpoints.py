"""Killed runs: processes that die by SIGKILL after steps and while they write, and what resumes them."""

import gc
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from helpers import WORDS, make_sample, make_trainer
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerState

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.trainer import ILVRTrainer
from ilvr.trainer.running import checkpoints
from ilvr.trainer.running.checkpoints import MANIFEST, find_damage, last_whole_checkpoint
from ilvr.trainer.teacher import MomentumTeacher


# One process imports everything before it has run a single operation, and forks: a run then starts in no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ilvr.trainer", "peft", "datasets", "transformers.models.qwen2_5_vl"])

# 5 micro-batches an epoch are 3 steps, the last of them shorter: 8 steps end in the middle of the third epoch.
SAMPLES = [make_sample([WORDS[(i + j) % 4] for j in range(2 + i % 3)], f"Plan {i}") for i in range(10)]
SETTINGS = {
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "alignment_noise": 0.1,
    "teacher_decay": 0.9,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
}
WRITERS = {
    "teacher.safetensors": (MomentumTeacher, "save"),
    "model.safetensors": (ILVRTrainer, "save_model"),
    "adapter_model.safetensors": (ILVRTrainer, "save_model"),
    "optimizer.pt": (ILVRTrainer, "_save_optimizer_and_scheduler"),
    "rng_state.pth": (ILVRTrainer, "_save_rng_state"),
    "trainer_state.json": (TrainerState, "save_to_json"),
    "checkpoint_manifest.json": (checkpoints, "write_manifest"),
    "rotation": (checkpoints, "rotate_checkpoints"),
}
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
TIMES |= {"step_time", "tokens_per_second"}


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


class Death(TrainerCallback):
    def __init__(self, moment):
        self.moment = moment

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.moment:
            die()

    def on_train_end(self, args, state, control, **kwargs):
        if self.moment == "end":
            die()


def die_while_writing(file: str, step: int):
    """Replaces the writer of a file by one that dies half-way, at the checkpoint of `step`."""
    owner, name = WRITERS[file]
    original = getattr(owner, name)

    def write(*args, **kwargs):
        folder = next(Path(a) for a in (*args, *kwargs.values()) if isinstance(a, (str, Path)))
        if file == "rotation" and (folder / f"checkpoint-{step}").is_dir():
            oldest = min(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            (oldest / "model.safetensors").unlink()
            die()
        folder = folder.parent if folder.suffix else folder
        if file == "checkpoint_manifest.json" and folder.name == f"checkpoint-{step}":
            die()
        original(*args, **kwargs)
        if folder.name == f"checkpoint-{step}":
            os.truncate(folder / file, (folder / file).stat().st_size // 2)
            die()

    setattr(owner, name, write)


def run(start: Path, folder: Path, moment, adapter: bool, settings: dict, environment: dict | None = None):
    """A run as a user starts it again and again: it goes on from what is there."""
    torch.set_num_threads(1)
    gc.freeze()  # as for the tests of this process
    os.environ.update(environment or {})
    if isinstance(moment, tuple):
        die_while_writing(*moment)
    model = ILVRForConditionalGeneration.from_pretrained(start)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if adapter else None
    trainer = make_trainer(
        model,
        ILVRProcessor.from_pretrained(start),
        folder,
        SAMPLES,
        callbacks=[Death(moment)],
        peft_config=lora,
        **{**SETTINGS, **settings},
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder) is not None)
    trainer.save_model(folder / "final")
    if trainer.is_world_process_zero():
        if trainer.teacher is not None:
            trainer.teacher.save(folder / "final")
        torch.save(trainer.optimizer.state_dict(), folder / "final" / "optimizer.pt")
    trainer.save_state()


def start_run(*args) -> int | None:
    process = PROCESSES.Process(target=run, args=args)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def start(_model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    for part in (_model, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """Folders of whole runs, one for each of the settings."""
    done = {}

    def get(adapter, settings):
        key = (adapter, *settings.items())
        if key not in done:
            done[key] = tmp_path_factory.mktemp("whole")
            assert start_run(start, done[key], None, adapter, settings) == 0
        return done[key]

    return get


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (torch.Tensor, numpy.ndarray)):
        return bool((a == b).all())
    return a == b


def log_of(folder: Path) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in history]


def check_equal(found: Path, expected: Path):
    """Every number, exactly: the log, the weights, the teacher, optimizer, schedule and random states."""
    assert log_of(found) == log_of(expected)
    for folder in ("final", "checkpoint-8"):
        names = {path.name for path in (expected / folder).glob("*.safetensors")}
        assert names == {path.name for path in (found / folder).glob("*.safetensors")} and names
        for name in names:
            a, b = load_file(found / folder / name), load_file(expected / folder / name)
            different = [key for key in b if not a[key].equal(b[key])]
            assert a.keys() == b.keys() and not different, (folder, name, different[:3])
    load = partial(torch.load, weights_only=False)
    states = [expected / "final" / "optimizer.pt", *(expected / "checkpoint-8").glob("*.pt*")]
    assert len(states) >= 4
    for path in states:
        name = path.relative_to(expected)
        assert same(load(found / name), load(path)), name


STAGE_2 = {"stage": 2, "logging_steps": 3}


@pytest.mark.parametrize(
    ("moments", "adapter", "settings"),
    [
        ([1, 3, 4, 8, "end"], False, {}),
        ([("teacher.safetensors", 2), ("model.safetensors", 4), ("optimizer.pt", 4)], False, {}),
        ([("rng_state.pth", 4), ("trainer_state.json", 6), ("checkpoint_manifest.json", 8)], False, {}),
        ([("rotation", 4)], False, {"save_total_limit": 1}),
        ([3, ("model.safetensors", 4), 7], False, STAGE_2),
        ([5, ("adapter_model.safetensors", 6)], True, {}),
    ],
    ids=["steps", "weights", "states", "rotation", "stage 2", "adapter"],
)
def test_killed_runs_equal_an_uninterrupted_one(start, uninterrupted, tmp_path, moments, adapter, settings):
    """Each process is killed at one moment, and the next goes on."""
    for moment in moments:
        assert start_run(start, tmp_path, moment, adapter, settings) == -signal.SIGKILL, moment
    assert start_run(start, tmp_path, None, adapter, settings) == 0
    reference = {name: value for name, value in settings.items() if name != "save_total_limit"}
    check_equal(tmp_path, uninterrupted(adapter, reference))
    kept = ["checkpoint-8"] if settings.get("save_total_limit") == 1 else ["checkpoint-6", "checkpoint-8"]
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == kept


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_runs_killed_at_random_times_equal_an_uninterrupted_one(start, uninterrupted, tmp_path, seed):
    """From outside, whatever they do, saving at each step, until one gets to the end."""
    draw, kills, arguments = random.Random(seed), 0, (start, tmp_path, None, False, {"save_steps": 1})
    while True:
        process = PROCESSES.Process(target=run, args=arguments)
        process.start()
        before = len(list(tmp_path.glob("checkpoint-*")))
        while process.is_alive() and len(list(tmp_path.glob("checkpoint-*"))) == before and kills < 20:
            time.sleep(0.005)  # loading takes longest: the delay counts from the first sign of a save
        process.join(draw.uniform(0, 0.3) if kills < 20 else 120)
        if process.exitcode == 0:
            break
        assert process.exitcode is None
        process.kill()
        process.join()
        kills += 1
    check_equal(tmp_path, uninterrupted(False, {}))
    assert kills


def start_ranks(*args) -> set[int | None]:
    """Two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [PROCESSES.Process(target=run, args=(*args, rank)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return {process.exitcode for process in processes}


@pytest.mark.slow
def test_killed_runs_of_two_processes(start, tmp_path):
    """The manifest waits for the random states of all ranks."""
    settings = {"ddp_backend": "gloo", "per_device_train_batch_size": 1}
    for moment, folder in ((None, "whole"), (5, "killed"), (None, "killed")):
        exits = start_ranks(start, tmp_path / folder, moment, False, settings)
        assert exits == {-signal.SIGKILL if moment else 0}
    sizes = json.loads((tmp_path / "killed" / "checkpoint-8" / MANIFEST).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "running_log_0.json", "running_log_1.json"} <= sizes.keys()
    check_equal(tmp_path / "killed", tmp_path / "whole")


@pytest.fixture(scope="module")
def saved(start, tmp_path_factory):
    """A run with three whole checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": None}
    assert start_run(start, folder, None, False, settings) == 0
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy of its newest checkpoint, beside an older one."""
    for step in (2, 3):
        shutil.copytree(saved / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path / "checkpoint-3"


FILES = ("model.safetensors", "teacher.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
FILES += ("trainer_state.json", "config.json", "training_args.bin", "running_log_0.json")
NEEDED = ("teacher.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")


def test_the_manifest_lists_what_a_checkpoint_holds(checkpoint):
    assert find_damage(checkpoint, NEEDED) is None
    sizes = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert set(FILES) <= sizes.keys() and sizes["optimizer.pt"] == (checkpoint / "optimizer.pt").stat().st_size
    (checkpoint / "README.md").write_text("An edited card, and notes beside it, damage nothing.")
    (checkpoint / "notes.txt").write_text("")
    assert find_damage(checkpoint, NEEDED) is None


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_damage(checkpoint, file, manifest):
    if not manifest:
        (checkpoint / MANIFEST).unlink()
        assert find_damage(checkpoint, NEEDED) is None
    size = (checkpoint / file).stat().st_size
    for rest in (size - 1, size // 2, 0) if manifest else (size // 2, 0):
        os.truncate(checkpoint / file, rest)
        assert find_damage(checkpoint, NEEDED).startswith((f"{file} cannot be read", f"{file} has {rest} bytes"))


@pytest.mark.parametrize("file", [*FILES, "tokenizer.json"])
def test_a_missing_file_is_damage(checkpoint, file):
    (checkpoint / file).unlink()
    assert find_damage(checkpoint) == f"{file} is missing"


@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state.json", *NEEDED])
def test_a_missing_file_is_damage_without_a_manifest_too(checkpoint, file):
    for name in (MANIFEST, file.replace("*", "")):
        (checkpoint / name).unlink()
    found = find_damage(checkpoint, NEEDED)
    assert found == ("the weights are missing" if file == "model.safetensors" else f"{file} is missing")


def test_shards_are_counted_without_a_manifest(checkpoint):
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert find_damage(checkpoint) == "model-00002-of-00002.safetensors is missing"


def test_other_damage(checkpoint):
    content = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * len(content))
    assert find_damage(checkpoint).startswith("model.safetensors cannot be read")
    (checkpoint / "model.safetensors").write_bytes(content)
    (checkpoint / "chat_template.jinja").write_text("")
    assert re.fullmatch(r"chat_template.jinja has 0 bytes instead of \d+", find_damage(checkpoint))
    (checkpoint / MANIFEST).write_text("{")
    assert find_damage(checkpoint).startswith(f"{MANIFEST} cannot be read")
    assert find_damage(checkpoint.parent / "checkpoint-9") == "there is no such folder"


@pytest.mark.parametrize(
    "manifest", ["[]", "{}", '{"files": {}}', '{"files": ["a"]}', '{"files": 3}', "[" * 100_000, '{"files": null}']
)
def test_a_manifest_of_another_form_is_damage(checkpoint, manifest):
    (checkpoint / MANIFEST).write_text(manifest)
    assert find_damage(checkpoint)
    assert last_whole_checkpoint(checkpoint.parent).endswith("checkpoint-2")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_without_weights_is_damage(checkpoint, index):
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "model.safetensors.index.json").write_text(index)
    assert find_damage(checkpoint) == "model.safetensors.index.json names no weights"


def test_the_newest_whole_checkpoint_is_used_and_damaged_ones_are_named(checkpoint, monkeypatch):
    messages = []
    monkeypatch.setattr(checkpoints.logger, "warning", messages.append)
    folder = checkpoint.parent
    assert last_whole_checkpoint(folder) == str(checkpoint) and not messages
    (checkpoint / "optimizer.pt").unlink()
    (folder / "checkpoint-10").mkdir()  # newer than 3, though not by name
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
    assert f"{folder / 'checkpoint-10'}: the weights are missing" in messages[0]
    assert f"{checkpoint}: optimizer.pt is missing" in messages[1] and len(messages) == 2
    assert last_whole_checkpoint(folder / "nothing") is None


def test_a_damaged_checkpoint_is_refused_by_its_path(model, processor, checkpoint):
    trainer = make_trainer(model, processor, checkpoint.parent, SAMPLES, max_steps=4)
    os.truncate(checkpoint / "teacher.safetensors", 100)
    with pytest.raises(ValueError, match=r"checkpoint-3 is damaged: teacher.safetensors .*from .*checkpoint-2"):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    shutil.rmtree(checkpoint.parent / "checkpoint-2")
    with pytest.raises(ValueError, match="there is no whole one beside it"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="No whole checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


def test_a_whole_checkpoint_stays_until_the_same_step_is_whole_again(model, processor, checkpoint, monkeypatch):
    """As when an older one is resumed by its path; what a half-written folder held does not mix with the new files."""
    (checkpoint / "left.over").write_text("")
    trainer = make_trainer(
        model, processor, checkpoint.parent, SAMPLES, max_steps=3, save_strategy="steps", save_total_limit=1
    )

    def fail(*args):
        raise OSError("disk full")

    older = checkpoint.parent / "checkpoint-2"
    with monkeypatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", fail)
        with pytest.raises(OSError, match="disk full") as caught:
            trainer.train(resume_from_checkpoint=older)
    assert f"{checkpoint.name} was not written to the end" in caught.value.__notes__[0]
    assert trainer.args.save_total_limit == 1 and find_damage(checkpoint) == "it was not written to the end"
    assert last_whole_checkpoint(checkpoint.parent).endswith("replaced-checkpoint-3")
    trainer.train(resume_from_checkpoint=older)
    assert find_damage(checkpoint, NEEDED) is None and not (checkpoint / "left.over").exists()
    assert [path.name for path in checkpoint.parent.glob("*checkpoint-*")] == ["checkpoint-3"]
    assert torch.load(checkpoint / "training_args.bin", weights_only=False).save_total_limit == 1


def test_rotation_deletes_damaged_checkpoints_before_whole_ones(model, processor, checkpoint):
    """Transformers goes by step where times are close, and would keep the damaged one."""
    (checkpoint.parent / "checkpoint-9").mkdir()
    make_trainer(
        model, processor, checkpoint.parent, SAMPLES, max_steps=4, save_strategy="steps", save_total_limit=2
    ).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in checkpoint.parent.glob("*checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_checkpoint_is_whole_when_it_is_pushed(model, processor, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(find_damage(folder, NEEDED))
    )
    trainer = make_trainer(
        model, processor, tmp_path, SAMPLES, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2
    )
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [None] * 3
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_fresh_start_beside_checkpoints_is_warned_of(model, processor, checkpoint, monkeypatch):
    messages = []
    monkeypatch.setattr(checkpoints.logger, "warning", messages.append)
    trainer = make_trainer(
        model, processor, checkpoint.parent, SAMPLES, max_steps=1, save_strategy="steps", save_steps=5
    )
    trainer.train()
    assert len(messages) == 1 and "up to checkpoint-3, and this one starts anew" in messages[0]
