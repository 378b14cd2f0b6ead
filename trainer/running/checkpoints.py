"""Whole and damaged checkpoints: a manifest written last, what is wrong with a folder, the newest whole one."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from ilvr.hub_cards.model_card import CARD_DATA


logger = logging.get_logger(__name__)

MANIFEST = "checkpoint_manifest.json"
# A whole checkpoint that is saved again stands aside under this name until the new one is whole.
ASIDE = "replaced-"
# Model cards are made to be edited after the save.
NOT_LISTED = {MANIFEST, "README.md", CARD_DATA}
# Model, adapter, FSDP and DeepSpeed.
WEIGHTS = ("model*.safetensors", "pytorch_model*", "**/adapter_model.*", "global_step*")


def write_manifest(checkpoint: str | Path, settings: dict | None = None) -> None:
    """Declares a checkpoint whole: lists the size of each file, once all of them have reached the disk.

    Args:
        checkpoint (`str` or `Path`): a folder that nothing will be written to any more.
        settings (`dict`, *optional*): of the run, which [`check_run`] compares.
    """
    folder = Path(checkpoint)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in NOT_LISTED]
    for path in files:
        _flush(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    unfinished = folder / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps({"files": sizes, "settings": settings or {}}, indent=2) + "\n", encoding="utf-8")
    _flush(unfinished)
    os.replace(unfinished, folder / MANIFEST)
    if os.name == "posix":  # elsewhere folders cannot be opened
        _flush(folder)
        _flush(folder.parent)


def find_damage(checkpoint: str | Path, needed: Sequence[str] = ()) -> str | None:
    """
    What is wrong with a checkpoint, in words, or `None` if it is whole.

    With a manifest, it must be complete, and the sizes of the files are compared. Without one, as other trainers write
    them, a checkpoint needs weights and the `trainer_state.json`, which `Trainer` writes last. Headers of safetensors,
    JSON and the directories of torch files are read in both cases; tensors are not, so the cost does not depend on the
    size of the model.

    Args:
        checkpoint (`str` or `Path`).
        needed (`Sequence[str]`, *optional*): patterns of files without which training cannot go on exactly.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        if problem := _unreadable(path):
            return f"{path.relative_to(folder)} {problem}"
    if (folder / MANIFEST).is_file():
        sizes = _read_manifest(folder).get("files")
        if sizes is None:
            return "it was not written to the end"
        if not isinstance(sizes, dict) or not sizes:
            return f"{MANIFEST} lists no files"
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
    else:
        if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
            return "the weights are missing"
        for index in folder.glob("*.index.json"):
            shards = _read_object(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                return f"{index.name} names no weights"
            for name in sorted(map(str, set(shards.values()))):
                if not (folder / name).is_file():
                    return f"{name} is missing"
        needed = ["trainer_state.json", *needed]
    return next((f"{pattern} is missing" for pattern in needed if not any(folder.glob(pattern))), None)


def check_run(checkpoint: str | Path, settings: dict) -> None:
    """Compares the settings of a run with those of the one that wrote a checkpoint.

    Args:
        checkpoint (`str` or `Path`): a whole one.
        settings (`dict`): of the run that is to go on from it, see `DurableTrainer.run_settings`.

    Raises:
        ValueError: if they differ.
    """
    saved = _read_manifest(Path(checkpoint)).get("settings") or {}
    different = [
        f"{name} {saved[name]!r}, not {value!r}" for name, value in settings.items() if saved.get(name, value) != value
    ]
    if different:
        raise ValueError(
            f"{checkpoint} is of a run with {', '.join(different)}. Resume with its settings, or start anew in "
            "another output_dir."
        )


def last_whole_checkpoint(output_dir: str | Path, needed: Sequence[str] = ()) -> str | None:
    """
    The checkpoint of the highest step that is whole; damaged ones on the way are named in a warning.

    Args:
        output_dir (`str` or `Path`): the folder of a run.
        needed (`Sequence[str]`, *optional*): see [`find_damage`].
    """
    for folder in _checkpoints(output_dir):
        damage = find_damage(folder, needed)
        if damage is None:
            return str(folder)
        logger.warning(f"Skipping the damaged checkpoint {folder}: {damage}. The next older one is looked at.")
    return None


def resolve_checkpoint(
    checkpoint: str | Path | Literal[True], output_dir: str | Path, needed: Sequence[str] = ()
) -> str:
    """
    The folder to resume from.

    Args:
        checkpoint (`str`, `Path` or `bool`): a folder, or `True` for the newest whole one in `output_dir`.
        output_dir (`str` or `Path`).
        needed (`Sequence[str]`, *optional*): see [`find_damage`].

    Raises:
        ValueError: if the folder is damaged, or none is whole.
    """
    if checkpoint is True:
        newest = last_whole_checkpoint(output_dir, needed)
        if newest is None:
            raise ValueError(f"No whole checkpoint in {output_dir}: train without `resume_from_checkpoint`.")
        return newest
    damage = find_damage(checkpoint, needed)
    if damage is not None:
        newest = last_whole_checkpoint(Path(checkpoint).parent, needed)
        remedy = f"resume from {newest}" if newest else "there is no whole one beside it: train from the start"
        raise ValueError(f"`resume_from_checkpoint` {checkpoint} is damaged: {damage}. Remedy: {remedy}.")
    return str(checkpoint)


def warn_of_earlier_run(output_dir: str | Path) -> None:
    """A resume goes by step, so it would take up an earlier run that got further than the one that starts now."""
    if earlier := _checkpoints(output_dir):
        logger.warning(
            f"{output_dir} holds checkpoints of an earlier run, up to {earlier[0].name}, and this one starts anew. A "
            "later resume takes the highest step, whichever run it is of: remove them or use another folder."
        )


class CheckpointWriter:
    """
    Makes what `Trainer._save_checkpoint` writes inside it whole or recognisably damaged, whenever it is killed.

    Trainer deletes older checkpoints without knowing whether the new one has reached the disk, and counts damaged ones
    as good; here that comes after the manifest.

    Args:
        trainer ([`~transformers.Trainer`]).
        checkpoint (`str` or `Path`): the folder that it writes; it is empty when the block starts.
        settings (`dict`): of the run, for the manifest.
    """

    def __init__(self, trainer: Trainer, checkpoint: str | Path, settings: dict) -> None:
        self.trainer, self.folder, self.settings = trainer, Path(checkpoint), settings
        self.limit, self.finished = trainer.args.save_total_limit, False

    def __enter__(self) -> "CheckpointWriter":
        if self.trainer.args.should_save:
            _make_room(self.folder)
        self.trainer.accelerator.wait_for_everyone()
        self.trainer.args.save_total_limit = None
        return self

    def finish(self) -> None:
        """Writes the manifest once all processes have written their files; called before a folder is pushed."""
        args = self.trainer.args
        args.save_total_limit, self.finished = self.limit, True
        self.trainer.accelerator.wait_for_everyone()
        if not args.should_save:
            return
        torch.save(args, self.folder / TRAINING_ARGS_NAME)  # Trainer saved them without the limit
        write_manifest(self.folder, self.settings)
        shutil.rmtree(_aside(self.folder), ignore_errors=True)
        if self.limit:
            for other in _checkpoints(self.folder.parent):
                if find_damage(other):
                    shutil.rmtree(other, ignore_errors=True)

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any):
        args = self.trainer.args
        args.save_total_limit = self.limit
        if error is not None and not self.finished:
            error.add_note(
                f"{self.folder} was not written to the end, and will be passed over. Once what stopped it is mended "
                "(a full disk, say), `train(resume_from_checkpoint=True)` goes on from the newest whole checkpoint."
            )
        if error is not None or self.finished:  # finished early, Trainer has rotated with the limit
            return
        self.finish()
        if args.should_save:
            best = self.trainer.state.best_model_checkpoint
            rotate_checkpoints(str(self.folder.parent), self.limit, best, use_mtime=True)


def _make_room(folder: Path):
    """A folder with nothing but an open manifest: what was there before must not mix with what is written now."""
    if find_damage(folder) is None:
        shutil.rmtree(_aside(folder), ignore_errors=True)
        os.replace(folder, _aside(folder))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps({"files": None}) + "\n", encoding="utf-8")


def _aside(folder: Path) -> Path:
    return folder.with_name(ASIDE + folder.name)


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders of checkpoints, newest first."""
    found = {}
    for path in Path(output_dir).glob("*checkpoint-*"):
        match = re.fullmatch(rf"({ASIDE})?checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[2]), match[1] is None] = path
    return [found[key] for key in sorted(found, reverse=True)]


def _read_object(path: Path) -> dict:
    """A JSON object; empty for other JSON, whose names are then missing."""
    found = json.loads(path.read_bytes()) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _read_manifest(folder: Path) -> dict:
    return _read_object(folder / MANIFEST)


def _unreadable(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix in (".pt", ".pth", ".bin"):
            ZipFile(path).close()
    except (OSError, ValueError, RecursionError, SafetensorError, BadZipFile) as error:
        return f"cannot be read ({error})"
    return None


def _flush(path: Path):
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
