"""The pages of the documentation: their Python and their commands run, and what they say of the code is so."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from fnmatch import fnmatch
from functools import partial
from importlib import import_module

import pytest
import yaml
from helpers import REFERENCE, make_image, write_jsonl
from hub_server import HubServer
from pages import REPOSITORY, blocks, run
from peft import LoraConfig

import ilvr
from ilvr import trainer as trainers
from ilvr.evaluation import load_questions
from ilvr.trainer import ILVRGRPOConfig, ILVRTrainingConfig


ROOMS = {"modeling_ilvr": "ilvr"} | {
    room: f"ilvr.{room}" for room in ("trainer", "data", "tasks", "evaluation", "hub_cards")
}
ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


def page(name: str) -> str:
    return (REPOSITORY / "docs" / f"{name}.md").read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of all tables of a page."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\|", "|") for cell in cells] for cells in lines]


@pytest.fixture
def cups(model, processor, tmp_path, monkeypatch):
    """What the page *Start* leaves, of a tiny model."""
    monkeypatch.chdir(tmp_path)
    for stage in ("stage1", "stage2"):
        model.save_pretrained(f"cups/{stage}")
        processor.save_pretrained(f"cups/{stage}")
    make_image("red").save("cups/29.png")
    return tmp_path


def test_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    fewer = {
        '"max_steps": 60': '"max_steps": 1',
        '"max_steps": 10': '"max_steps": 1',
        "patch_size=14": "patch_size=28",
    }
    run("docs/start.md", names := {}, fewer)
    shown = capsys.readouterr().out
    assert "24: 24 good, 0 bad" in shown and "| another sample's | 6 |" in shown
    assert len(names["output"].latents) == 1


def test_hub(cups):
    """In a process of its own, with the real client against a local server that holds a checkpoint already."""
    script = f"""
import sys
sys.path[:0] = {[str(REPOSITORY / "tests"), str(REPOSITORY / "examples")]!r}
from helpers import make_dataset
from ilvr import ILVRForConditionalGeneration, ILVRProcessor, trainer
from pages import run
ILVRForConditionalGeneration.from_pretrained("cups/stage1").push_to_hub("user/cups")
ILVRProcessor.from_pretrained("cups/stage1").push_to_hub("user/cups")
config = trainer.ILVRTrainingConfig
trainer.ILVRTrainingConfig = lambda *args, **kwargs: config(*args, **{ON_CPU!r}, max_steps=1, **kwargs)
run("docs/hub.md", {{"train": make_dataset()}})
"""
    server = HubServer()
    with server as url:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": url,
            "HF_HOME": str(cups / "home"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    files = server.repos["user/cups"]
    known = [name for cells in rows(page("hub")) for name in re.findall(r"`([^`]+)`", cells[0])]
    unknown = [name for name in files if not any(fnmatch(name, pattern) for pattern in known)]
    assert set(unknown) <= {"generation_config.json"}
    assert sum(data.count(b"\n") for name, data in files.items() if name.endswith(".py")) < 3000
    assert "another sample's latents" in (cups / "cups/stage2/README.md").read_text()


def test_serving(cups, capsys):
    run("docs/serving.md", {})
    assert [block.reason for block in blocks("docs/serving.md") if block.reason] == [
        "it serves until it is interrupted",
        "it needs the server",
    ]


def test_reinforcement_learning(cups, monkeypatch):
    monkeypatch.setattr(trainers, "ILVRGRPOConfig", partial(ILVRGRPOConfig, **ON_CPU, max_steps=1))
    fewer = {'"stage2"': '"cups/stage2"', "boards=2000, test_boards=500": "boards=4, test_boards=1"}
    run(
        "docs/reinforcement_learning.md",
        names := {},
        {**fewer, "max_completion_length=96": "max_completion_length=12"},
    )
    assert "rewards/format_reward/mean" in names["trainer"].state.log_history[0]


def test_audit(cups, model, processor):
    names = {"model": model, "processor": processor}
    few = {
        "runs/shifts_small/stage": "cups/stage",
        "test_boards=500": "test_boards=3",
        '"test_boards": 500': '"test_boards": 3',
    }
    few |= {"max_new_tokens=128": "max_new_tokens=4"}
    code, levels = [block.code for block in blocks("docs/audit.md") if block.language == "python"]
    for old, new in few.items():
        code = code.replace(old, new)
    exec(compile(code, "docs/audit.md", "exec"), names)
    assert list(names["runs"]) == ["own", "another_sample", "position_mean"]
    (cups / "vsp").mkdir()
    write_jsonl(cups / "vsp" / "test_direct.jsonl", [{"text_input": "Plan on <image>."}])
    exec(compile(levels.replace("100", "2"), "docs/audit.md", "exec"), names)
    assert [len(board) for board in load_questions("vsp_unseen/levels.jsonl").references] == [7, 7, 8, 8]


def test_paper_to_config(backbone_dir, monkeypatch):
    """The names and values of the tables are those of the setting that the page writes out."""
    monkeypatch.setattr(trainers, "ILVRTrainingConfig", partial(ILVRTrainingConfig, **ON_CPU))
    run("docs/paper_to_config.md", names := {}, {"Qwen/Qwen2.5-VL-7B-Instruct": str(backbone_dir)})
    told = [cells[1] for cells in rows(page("paper_to_config"))]
    for name, value in re.findall(r"`(\w+)=([^`]+)`", " ".join(told)):
        if name == "peft_config":
            continue
        expected = ast.literal_eval(value)
        configs = [names["model"].config, *((names["stage2"],) if name in ("stage", "learning_rate") else ())]
        configs += [names["stage1"]] if name != "stage" else []
        found = [getattr(config, name) for config in configs if hasattr(config, name)]
        assert found and all(one == expected for one in found), (name, value, found)
    assert (names["stage1"].selection_temperature, names["stage2"].learning_rate) == (1.0, 1e-5)
    assert names["model"].config.latent_size == names["processor"].latent_size == 8
    assert names["stage2"].alignment_weight == 0.0


def test_from_reference_code(image_root, monkeypatch):
    monkeypatch.chdir(image_root.parent)
    write_jsonl(image_root / "TRAIN.jsonl", [REFERENCE])
    block, convert, evaluate = blocks("docs/from_reference_code.md")
    exec(block.code.replace('"data', '"images'), names := {})
    assert names["train"][0]["answer"] == "R" and json.loads(names["train"][0]["metadata"])["map_desc"]
    assert convert.code.startswith("ilvr convert ") and evaluate.code.startswith("ilvr evaluate ")
    options = {option.name for config in (ILVRTrainingConfig, LoraConfig) for option in fields(config)}
    named = re.findall(r"`(\w+)=", page("from_reference_code"))
    named += re.findall(
        r"`(alignment_weight|ce_weight|teacher_decay|selection_top_p|max_candidates|warmup_steps)`",
        page("from_reference_code"),
    )
    assert set(named) <= options | {"peft_config", "latent_head"}


def test_python_elsewhere_is_run_or_marked():
    """New pages are added here with what they need, or their blocks say why they are not run."""
    here = {"start", "hub", "serving", "paper_to_config", "from_reference_code", "audit", "reinforcement_learning"}
    elsewhere = {
        "data",
        "training",
    }  # tests/commands/test_check_data.py; tests/modeling/test_attention_rules.py, one block
    told = {*here, *elsewhere, "tasks", "parallel_latents"}
    for path in sorted((REPOSITORY / "docs").rglob("*.md")):
        name = path.relative_to(REPOSITORY / "docs").with_suffix("").as_posix()
        found = [b for b in blocks(f"docs/{name}.md") if b.language == "python" and b.reason is None]
        assert not found or name in told, name


def test_messages_are_those_of_the_code():
    """What *Troubleshooting* shows, with `…` for names and numbers, is a part of some text in the code."""
    texts = []
    for room in (*ROOMS, "commands"):
        for path in (REPOSITORY / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    ours = page("troubleshooting").split("## Messages of others")[0]
    messages = [cells[0].strip("`") for cells in rows(ours) if cells[0].startswith("`")]
    assert len(messages) > 25
    for message in messages:
        parts = [re.escape(part) for part in message.strip("… ").split("…")]
        pattern = re.compile(r".{0,80}?".join(parts))
        assert any(pattern.search(text) for text in texts), message


def test_reference_has_all_public_names_and_no_others():
    for room, module in ROOMS.items():
        name = "model" if room == "modeling_ilvr" else "training" if room == "trainer" else room
        shown = re.findall(r"^::: (\S+)$", page(f"api/{name}"), re.M)
        assert sorted(shown) == sorted(f"{module}.{public}" for public in import_module(module).__all__)


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert project["version"] == ilvr.__version__ == citation["version"]
