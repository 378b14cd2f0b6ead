"""`ilvr card` and `ilvr push`: the card from what is saved, what goes to the Hub, and with whose token."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
import yaml
from helpers import make_trainer, run_without_ilvr
from hub_server import HubServer
from huggingface_hub import constants

from ilvr.hub_cards import ILVRModelCard, Result
from ilvr.hub_cards.model_card import CARD_DATA
from ilvr_commands.main import main
from ilvr_commands.push import choose_files
from ilvr_commands.space import space_files


@pytest.fixture
def folder(model, processor, tmp_path) -> Path:
    """What a training of one step leaves, with a checkpoint within, and results in the card."""
    trainer = make_trainer(model, processor, tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    card = trainer.model_card()
    card.results = [Result("Planning 3x3", "end_on_goal", 0.9, 100, 0.82, 0.95)]
    card.controls = [Result("zeros", "end_on_goal", 0.1, 100)]
    card.save(tmp_path / "run")
    return tmp_path / "run"


def test_a_card_is_rebuilt_from_what_is_saved(folder, capsys):
    text = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    assert main(["card", str(folder)]) == 0
    assert (folder / "README.md").read_text() == text and "1 results, 1 controls" in capsys.readouterr().out
    assert main(["card", str(folder), "--repo_id", "user/tiny", "--license", "mit", "--dataset", "user/data"]) == 0
    changed = (folder / "README.md").read_text()
    assert 'from_pretrained("user/tiny", trust_remote_code=True)' in changed and "| zeros |" in changed
    matter = yaml.safe_load(changed.split("---")[1])
    assert matter["license"] == "mit" and matter["datasets"] == "user/data"
    assert ILVRModelCard.load(folder).license == "mit"


def test_a_card_of_a_checkpoint_whose_card_was_not_saved(folder, tmp_path, capsys):
    (folder / CARD_DATA).unlink()
    assert main(["card", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert "the next\n3 inputs" in text and "| optimizer steps | 1 |" in text and "Not measured yet." in text
    assert main(["card", str(tmp_path)]) == 2 and "holds no ILVR checkpoint" in capsys.readouterr().err
    (folder / CARD_DATA).write_text('{"model": 1}')
    assert main(["card", str(folder)]) == 2 and "is not what a card says" in capsys.readouterr().err


def test_results_on_data_of_the_hub_go_to_its_leaderboards(folder, capsys):
    card = ILVRModelCard.load(folder)
    card.results += [
        Result("CoMT", "accuracy", 0.51234, 200, dataset_id="czh-up/CoMT", dataset_config=name)
        for name in (None, "deletion")
    ]
    card.save(folder)
    (name,), (text,) = zip(*card.eval_results().items())
    assert name == ".eval_results/czh-up_CoMT.yaml"
    found = [(row["dataset"], row["value"], row["notes"]) for row in yaml.safe_load(text)]
    notes = "CoMT, accuracy, n = 200"
    tasks = ("default", "deletion")
    assert found == [({"id": "czh-up/CoMT", "task_id": task}, 0.5123, notes) for task in tasks]
    assert main(["push", str(folder), "user/tiny", "--dry_run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][name] == len(text)


def test_a_dry_run_says_what_goes_and_what_stays(folder, capsys):
    (folder / "training_args.bin").write_bytes(b"what another trainer leaves")
    assert main(["push", str(folder), "user/tiny", "--dry_run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"model.safetensors", "config.json", "README.md", CARD_DATA, "modeling_ilvr.py"} <= set(found["files"])
    assert found["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert found["left_out"]["training_args.bin"] == "may run code when it is read"
    assert found["left_out"]["trainer_state.json"] == "state of training" and "checkpoint-1/" in found["left_out"]
    assert (found["revision"], found["url"]) == ("main", None)
    assert main(["push", str(folder), "user/tiny", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "left out: may run code when it is read" in shown and "a dry run, nothing went to user/tiny" in shown


def test_nothing_that_runs_code_is_chosen_from_a_checkpoint_of_a_run(folder):
    inner = folder / "checkpoint-1"
    chosen, left = choose_files(inner)
    assert {path.name for path in inner.iterdir() if path.is_file()} == {*chosen, *left}
    assert all(name in left for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "teacher.safetensors"))
    assert "model.safetensors" in chosen and not any("running_log" in name for name in chosen)


def test_folders_that_are_no_checkpoints_are_refused(folder, tmp_path, capsys):
    def refused(message):
        assert main(["push", str(folder), "user/tiny", "--dry_run"]) == 2
        assert message in capsys.readouterr().err

    (folder / "README.md").unlink()
    refused(f"no model card. Write it: `ilvr card {folder}`")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "teacher.safetensors").write_bytes(b"")
    refused("no weights in safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen3_vl"}')
    refused("holds no ILVR checkpoint")
    assert main(["push", str(tmp_path / "nowhere"), "user/tiny"]) == 2


@pytest.fixture
def push(monkeypatch, capsys, tmp_path):
    """`ilvr push` to a Hub at an address."""

    def run(url: str, *arguments: str, token: str | None = "hf_mine") -> SimpleNamespace:
        here = {"ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_TOKEN_PATH": str(tmp_path / "token")}
        here |= {"HF_HUB_DISABLE_XET": True}  # the server knows LFS, and not what has taken its place
        for name, value in here.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        capsys.readouterr()
        code = main(["push", *arguments])
        shown = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=shown.out, stderr=shown.err)

    return run


def test_push_to_a_branch_of_a_private_repository_with_a_tag(folder, push):
    server = HubServer(token="hf_mine")
    with server as url:
        options = ["--private", "--revision", "dev", "--tag", "v1", "--message", "First"]
        done = push(url, str(folder), "user/tiny", *options)
    assert done.returncode == 0, done.stderr
    files = server.repos["user/tiny"]
    assert set(files) == set(choose_files(folder).chosen)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b'from_pretrained("user/tiny", trust_remote_code=True)' in files["README.md"]
    assert b'"run"' not in files["README.md"] and '"run"' in (folder / "README.md").read_text()
    assert server.private == {"user/tiny"} and server.commits == ["dev"]
    assert server.refs == {"dev": None, "v1": server.sha("user/tiny")}
    assert "left out" in done.stdout and "/user/tiny/commit/" in done.stdout


@pytest.mark.parametrize(("token", "message"), [(None, "hf auth login"), ("hf_other", "The Hub refuses the token")])
def test_push_needs_a_token_that_may_write(folder, push, token, message):
    server = HubServer(token="hf_mine")
    with server as url:
        done = push(url, str(folder), "user/tiny", token=token)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ilvr push: ")]
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0] and not server.repos


def test_files_that_are_large_go_by_lfs_and_are_found_by_their_commit(folder, push, tmp_path):
    """In a clean process, without ILVR: refused without `trust_remote_code`, loaded by the commit with it."""
    server = HubServer(token="hf_mine", lfs_above=20_000)
    with server as url:
        done = push(url, str(folder), "user/tiny")
        assert done.returncode == 0, done.stderr
        weights = (folder / "model.safetensors").read_bytes()
        assert weights in server.blobs.values() and server.repos["user/tiny"]["model.safetensors"] == weights
        out = run_without_ilvr(
            f"""
from transformers import AutoModelForImageTextToText
commit = {server.sha("user/tiny")!r}
try:
    AutoModelForImageTextToText.from_pretrained("user/tiny", revision=commit, trust_remote_code=False)
except ValueError as error:
    print("trust_remote_code=True" in str(error))
model = AutoModelForImageTextToText.from_pretrained("user/tiny", revision=commit, trust_remote_code=True)
print(type(model).__name__)
""",
            tmp_path / "modules",
            HF_ENDPOINT=url,
            HF_HOME=str(tmp_path / "clean"),
            HF_HUB_OFFLINE="0",
        )
    assert out.splitlines()[-2:] == ["True", "ILVRForConditionalGeneration"]


def test_a_hub_that_fails_midway_leaves_nothing_half_done(folder, push):
    """The client sends a file again that did not arrive; a commit that fails is said, and made by the next command."""
    server = HubServer(token="hf_mine", lfs_above=20_000)
    server.failures = ["/blobs/", "/commit/"]
    with server as url:
        done = push(url, str(folder), "user/tiny")
        assert done.returncode == 2 and not server.repos["user/tiny"] and server.blobs and not server.failures
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("ilvr push: ")]
        assert "The Hub failed with status 500 on user/tiny" in line and "run the command again" in line
        assert push(url, str(folder), "user/tiny").returncode == 0
    assert set(server.repos["user/tiny"]) == set(choose_files(folder).chosen)


def test_a_space_goes_up_beside_the_model(folder, push, capsys):
    space = ["--space", "user/tiny-demo", "--task", "shifts", "--task_settings", '{"boards": 1, "test_boards": 2}']
    assert main(["push", str(folder), "user/tiny", "--dry_run", "--json", *space]) == 0
    texts = json.loads(capsys.readouterr().out)["space_files"]
    server = HubServer(token="hf_mine")
    with server as url:
        done = push(url, str(folder), "user/tiny", *space, "--space_package", "ilvr[demo] @ here")
    assert done.returncode == 0, done.stderr
    files = server.repos["user/tiny-demo"]
    assert set(files) == set(texts) == {"README.md", "app.py", "requirements.txt"}
    matter = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (matter["sdk"], matter["models"], matter["app_file"]) == ("gradio", ["user/tiny"], "app.py")
    assert files["requirements.txt"].startswith(b"ilvr[demo] @ here\ntransformers==")
    assert server.commits == ["main", "main"] and "of the Space user/tiny-demo" in done.stdout


def test_the_app_of_a_space_serves_its_page(folder, tmp_path):
    settings = '{"boards": 1, "test_boards": 2, "lengths": [2, 3]}'
    (tmp_path / "app.py").write_text(space_files(str(folder), task="shifts", settings=settings)["app.py"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "HOST": "127.0.0.1", "PORT": str(port)}
    command = [sys.executable, str(tmp_path / "app.py")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as app:
        assert any("shows the page" in line for line in app.stderr)
        with urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert b"look into the latents" in answer.read()
        app.terminate()
