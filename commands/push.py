"""`ilvr push MODEL_DIR REPO_ID`: uploads a checkpoint in one commit, with no file that runs code when it is read.

With `--space` a Space that shows it goes up, too.
"""

import json
from argparse import Namespace
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from ilvr.hub_cards import ILVRModelCard
from ilvr.trainer.running.checkpoints import MANIFEST
from ilvr.trainer.teacher import TEACHER_FILE

from .space import space_files


SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".py", ".md", ".png")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
STATE = (TEACHER_FILE, MANIFEST, "trainer_state.json", "running_log_")  # of training: no one else reads them


class Files(NamedTuple):
    """Names of the files of a folder that are uploaded, and of those that are not, with the reason."""

    chosen: list[str]
    left: dict[str, str]


def choose_files(folder: Path) -> Files:
    """What of a checkpoint's folder is uploaded; subfolders, such as checkpoints of a run, never are.

    Raises:
        ValueError: if the folder holds no ILVR checkpoint or adapter in safetensors with its card.
    """
    chosen, left = [], {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            left[f"{path.name}/"] = "a folder"
        elif path.name.startswith((".", "_")):
            left[path.name] = "hidden"
        elif path.name.startswith(STATE):
            left[path.name] = "state of training"
        elif path.suffix not in SUFFIXES:
            left[path.name] = "may run code when it is read" if path.suffix in PICKLES else "not of a checkpoint"
        else:
            chosen.append(path.name)
    config = folder / "config.json"
    if not config.is_file() or json.loads(config.read_text(encoding="utf-8")).get("model_type") != "ilvr":
        raise ValueError(f"{folder} holds no ILVR checkpoint: it has no config.json of one. Name what was saved.")
    if not any(name.endswith(".safetensors") for name in chosen):
        raise ValueError(f"{folder} has no weights in safetensors. Save the model with `save_pretrained`.")
    if "README.md" not in chosen:
        raise ValueError(f"{folder} has no model card. Write it: `ilvr card {folder}`.")
    return Files(chosen, left)


def readme_for(folder: Path, repo_id: str) -> str:
    """The card as it is, whose code loads the repository in place of the folder."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ILVRModelCard.load(folder)
    return text.replace(f'from_pretrained("{card.repo_id or card.model_name}"', f'from_pretrained("{repo_id}"')


def run(options: Namespace) -> int:
    """Says what goes and what stays, and uploads it unless it is a dry run."""
    folder = Path(options.model_dir)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Name that of a checkpoint.")
    files = choose_files(folder)
    operations: list[CommitOperationAdd] = []
    for name in files.chosen:
        content = readme_for(folder, options.repo_id).encode() if name == "README.md" else folder / name
        operations.append(CommitOperationAdd(name, content))
    for name, text in ILVRModelCard.load(folder).eval_results().items():
        operations.append(CommitOperationAdd(name, text.encode()))
    sizes = {operation.path_in_repo: operation.upload_info.size for operation in operations}
    where = {"repo_id": options.repo_id, "revision": options.revision or "main", "private": options.private}
    page = {}
    if options.space is not None:
        page = space_files(options.repo_id, options.space_package, options.task, options.task_settings)
    url = None if options.dry_run else upload(operations, options)
    if page and not options.dry_run:
        upload_space(page, options)
    if options.json:
        found = {**where, "tag": options.tag, "files": sizes, "left_out": files.left, "url": url}
        print(json.dumps({**found, "space": options.space, "space_files": page}, indent=2))
        return 0
    for name, size in sizes.items():
        print(f"  {name:<32}{size:>15,} bytes")
    for name, text in page.items():
        print(f"  {name:<32}{len(text.encode()):>15,} bytes, of the Space {options.space}")
    for name, reason in files.left.items():
        print(f"  {name:<32}{'left out:':>15} {reason}")
    print(
        f"{len(sizes)} files, {sum(sizes.values()):,} bytes: {url or f'a dry run, nothing went to {options.repo_id}'}"
    )
    return 0


def upload(operations: list[CommitOperationAdd], options: Namespace) -> str:
    """Creates what does not exist of repository, branch and tag, and uploads all files in one commit.

    Returns:
        `str`: address of the commit.

    Raises:
        ValueError: if there is no token, or the Hub refuses it.
        ConnectionError: if the Hub fails.
    """
    if get_token() is None:
        raise ValueError("There is no token of the Hub: `hf auth login`, or set HF_TOKEN.")
    api = HfApi(library_name="ilvr")
    with clear_errors(options.repo_id):
        api.create_repo(options.repo_id, private=options.private or None, exist_ok=True)
        if options.revision is not None:
            api.create_branch(options.repo_id, branch=options.revision, exist_ok=True)
        message = options.message or f"Upload {Path(options.model_dir).resolve().name} with ilvr"
        commit = api.create_commit(options.repo_id, operations, commit_message=message, revision=options.revision)
        if options.tag is not None:
            api.create_tag(options.repo_id, tag=options.tag, revision=commit.oid)
    return commit.commit_url


def upload_space(page: dict[str, str], options: Namespace) -> None:
    """Creates the Space, if there is none, and uploads its files in one commit; errors are those of [`upload`]."""
    api = HfApi(library_name="ilvr")
    operations = [CommitOperationAdd(name, text.encode()) for name, text in page.items()]
    with clear_errors(options.space):
        api.create_repo(
            options.space, repo_type="space", space_sdk="gradio", private=options.private or None, exist_ok=True
        )
        message = f"Show {options.repo_id} with ilvr"
        api.create_commit(options.space, operations, repo_type="space", commit_message=message)


@contextmanager
def clear_errors(repo_id: str) -> Generator[None]:
    """Says what to do about an answer of the Hub that is an error."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"The Hub refuses the token for {repo_id}. It has to be one that may write there: `hf auth login`."
            ) from error
        if status >= 500:
            raise ConnectionError(
                f"The Hub failed with status {status} on {repo_id}. A commit is there as a whole or not at all: run "
                "the command again; files that are there are not sent twice."
            ) from error
        raise
