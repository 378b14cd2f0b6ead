"""`ilvr train` on data of one's own: what is held out, what is refused before training, and the report."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import make_image, perturb, write_jsonl
from safetensors.torch import load_file

from ilvr import ILVRForConditionalGeneration
from ilvr.data import load_conversations
from ilvr_commands.arguments import build_parser
from ilvr_commands.main import main
from ilvr_commands.own_data import load_own_data
from ilvr_commands.recipe import Recipe, read_recipe


def row(answer: str | None, question: str = "Which letter?") -> dict:
    image = {"type": "image"}
    said = [{"type": "text", "text": "Right"}, image, {"type": "text", "text": f"\\boxed{{{answer}}}"}]
    turns = [
        {"role": "user", "content": [image, {"type": "text", "text": question}]},
        {"role": "assistant", "content": said},
    ]
    return {"messages": turns, "images": ["board.png", "step.png"], "answer": answer}


@pytest.fixture
def data(tmp_path):
    """Ten rows to train on, two others to test with, and a recipe of one step a stage."""
    for name in ("board", "step"):
        make_image("red").save(tmp_path / f"{name}.png")
    write_jsonl(tmp_path / "train.jsonl", [row("ABCD"[i % 4], f"Letter {i}?") for i in range(10)])
    write_jsonl(tmp_path / "test.jsonl", [row("A"), row("B")])
    training = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    evaluation = {"max_new_tokens": 4, "controls": 2}
    recipe = {"latent_size": 2, "training": training, "evaluation": evaluation, "output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def parse(*arguments) -> Recipe:
    return read_recipe(build_parser().parse_args(["train", *map(str, arguments)]))


def launched(monkeypatch, *arguments) -> Namespace:
    """What the launcher of accelerate is given."""
    found = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", found.append)
    assert main(["train", *map(str, arguments)]) == 0
    return found[0]


def test_processes_of_accelerate_by_the_name_of_a_config(data, monkeypatch):
    options = ["--dataset", "a b.jsonl", "--set", "stage1.max_steps=2"]
    found = launched(monkeypatch, data / "recipe.yaml", "--accelerate-config=fsdp2", *options, "--num-processes", 3)
    assert Path(found.config_file).name == "fsdp2.yaml" and Path(found.config_file).is_file()
    assert found.module and found.training_script == "ilvr_commands" and found.num_processes == 3
    assert found.training_script_args == ["train", str(data / "recipe.yaml"), *options]
    own = data / "own.yaml"
    own.write_text("distributed_type: NO\n")
    found = launched(monkeypatch, data / "recipe.yaml", "--accelerate_config", own)
    assert found.config_file == str(own) and found.num_processes is None


def test_an_unknown_config_of_accelerate_names_those_that_there_are(data, capsys):
    assert main(["train", str(data / "recipe.yaml"), "--accelerate_config", "fsdp"]) == 2
    assert "none of ddp, deepspeed_zero2, deepspeed_zero3, fsdp2" in capsys.readouterr().err


@pytest.mark.slow
def test_training_in_a_process_of_the_launcher(data, backbone_dir):
    config = data / "one_process.yaml"
    config.write_text(
        yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": True})
    )
    command = ["train", str(data / "recipe.yaml"), "--dataset", str(data / "train.jsonl"), "--accelerate_config"]
    assert main([*command, str(config), "--backbone", str(backbone_dir), "--test_size", "2"]) == 0
    assert list(json.loads((data / "run" / "results.json").read_text())) == ["stage1", "stage2"]


def test_train_with_test_data(data, backbone_dir, capsys):
    command = ["train", str(data / "recipe.yaml"), "--dataset", str(data / "train.jsonl")]
    command += ["--backbone", str(backbone_dir)]
    command += ["--test_dataset", str(data / "test.jsonl"), "--metric", "multiple_choice"]
    assert main([*command, "--set", "stage2.max_steps=2", "--latent_size=3"]) == 0
    run = data / "run"
    results = json.loads((run / "results.json").read_text())
    assert list(results) == ["stage1", "stage2"] and all(found["count"] == 2 for found in results.values())
    heading, _, *lines = (run / "results.md").read_text().splitlines()
    assert heading.startswith("| model | accuracy | invalid | own latents | another sample's |")
    assert lines[0].startswith("| stage1 | 0.0 % (0.0 – 65.8) | 100.0 % | 0.0 % (0.0 – 65.8) |")
    assert heading in capsys.readouterr().out
    assert (run / "latents.png").stat().st_size > 10_000 and (run / "curves.png").stat().st_size > 10_000
    card = (run / "stage2" / "README.md").read_text()
    assert "| test | accuracy | 0.0 % |" in card and "Which letter?" in card
    assert json.loads((run / "stage2" / "trainer_state.json").read_text())["global_step"] == 2
    assert ILVRForConditionalGeneration.from_pretrained(run / "stage2").config.latent_size == 3


def test_going_on_from_a_model(data, backbone_dir, processor, capsys):
    """By the stages that have settings, and from the one before, or from the model where there is none."""
    model = perturb(ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=3), scale=0.1)
    for part in (model, processor):
        part.save_pretrained(data / "model")
    recipe = yaml.safe_load((data / "recipe.yaml").read_text())
    (data / "further.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if k != "latent_size"}))
    command = ["train", str(data / "further.yaml"), "--dataset", str(data / "train.jsonl"), "--test_size", "2"]
    command += ["--model", str(data / "model"), "--set", "stage2={max_steps: 2, learning_rate: 0.001}"]
    grpo = "grpo={num_generations: 2, per_device_train_batch_size: 2, max_completion_length: 8, learning_rate: 0.0}"
    assert main([*command, "--set", grpo]) == 0
    run = data / "run"
    assert list(json.loads((run / "results.json").read_text())) == ["start", "stage2", "grpo"]
    assert not (run / "start").exists() and not (run / "stage1").exists()
    assert "| start | " in capsys.readouterr().out
    given, stage2, rewarded = (
        load_file(f / "model.safetensors") for f in (data / "model", run / "stage2", run / "grpo")
    )
    assert all(weight.equal(rewarded[name]) for name, weight in stage2.items())
    assert not all(weight.equal(given[name]) for name, weight in stage2.items())
    for name, weight in stage2.items():  # two steps from there
        torch.testing.assert_close(weight, given[name], rtol=0, atol=0.01, msg=name)


def test_what_is_held_out_follows_from_the_seed(data):
    def split(*arguments):
        train, task = load_own_data(parse("--dataset", data / "train.jsonl", *arguments))
        asked = [task.reference(sample) for sample in task.dataset("test")]
        return train, task, asked, sorted(map(str, [*train["messages"], *task.dataset("test")["messages"]]))

    train, task, asked, everything = split("--test_size", "3")
    assert (len(train), len(asked), task.metric) == (7, 3, "boxed_exact_match")
    assert everything == sorted(map(str, load_conversations(str(data / "train.jsonl"))["messages"]))
    assert split("--test_size=3")[2] == asked and split("--test_size=3", "--seed=1")[2] != asked
    assert len(split("--test_size=0.2")[2]) == 2 and len(split()[2]) == 1
    train, task = load_own_data(parse("--dataset", data / "train.jsonl", "--test_size=0"))
    assert len(train) == 10 and task is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "none.jsonl"], "There is no file none.jsonl"),
        (["--dataset", "nameless.jsonl"], "has none, so that nothing is right or wrong.*test_size=0"),
        (["--dataset", "train.jsonl", "--test_dataset", "nameless.jsonl"], "answer: sample 0 of nameless has none"),
        (["--dataset", "train.jsonl", "--metric", "glance"], "no metric 'glance'"),
        (["--dataset", "train.jsonl", "--test_size", "99"], "99"),
        (["--dataset", "train.jsonl", "--set", "dataset_kwargs.streaming=true"], "Nothing can be held out"),
        (["--dataset", "train.jsonl", "--set", "stage2.learing_rate=1"], "stage2 .*learing_rate"),
        (["--dataset", "train.jsonl", "--set", "stage3.max_steps=1"], "A recipe has no stage3; its fields are"),
        (["--dataset", "train.jsonl", "--set", "stage1"], "--set stage1: write it as NAME=VALUE"),
        (["--dataset", "train.jsonl", "--set", "stage1=1"], "stage1 takes several settings by their names, got 1"),
        (["--dataset", "train.jsonl", "--set", "seed.a=1"], "--set seed.a: "),
        (["--task", "shifts", "--test_dataset", "test.jsonl"], "has its own tests"),
        (["--dataset", "train.jsonl", "--model", "model"], "goes on as it is. Leave out backbone, latent_size"),
        (["none.yaml"], "none.yaml"),
    ],
)
def test_what_is_wrong_is_one_line_before_training(data, backbone_dir, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(data)
    write_jsonl(data / "nameless.jsonl", [row(None)] * 4)
    monkeypatch.setattr("ilvr_commands.train.train", lambda *_: pytest.fail("a phase was trained"))
    config = [] if arguments[0].endswith(".yaml") else ["recipe.yaml"]
    assert main(["train", *config, "--backbone", str(backbone_dir), "--seed=1", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ilvr train: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), lines


def test_values_of_set(data):
    recipe = parse(
        *("--config", data / "recipe.yaml", "--resume", "true"),
        *("--set", "stage1.learning_rate=1e-5", "--set", "task_settings.lengths=[4, 10]"),
        *("--set", "training.save_strategy='no'", "--set", "seed=3", "--set", "training.use_cpu=false"),
    )
    assert recipe.stage1 == {"learning_rate": 1e-5} and recipe.task_settings == {"lengths": [4, 10]}
    assert recipe.training["save_strategy"] == "no" and recipe.training["use_cpu"] is False
    assert recipe.training["max_steps"] == 1 and recipe.seed == 3 and recipe.resume is True
    assert parse("--resume").resume is True and parse("--resume=false").resume is False
