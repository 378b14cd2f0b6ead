"""The examples: the main job end to end on a tiny model, and the recipes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from helpers import make_image
from transformers import Qwen2_5_VLConfig

from ilvr import ILVRConfig, ILVRForConditionalGeneration
from ilvr.hub_cards import ILVRModelCard
from ilvr.trainer.ilvr_trainer import freeze_vision_tower
from ilvr_commands import push, train
from ilvr_commands.arguments import build_parser
from ilvr_commands.main import main
from ilvr_commands.recipe import Recipe, phases_of, read_recipe


EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = EXAMPLES / "recipes"
SMALL = yaml.safe_load((RECIPES / "frozen_lake_small.yaml").read_text())
# The recipe of `make train` with a smaller model, fewer maps and fewer steps.
TINY = {
    **SMALL,
    "small_backbone": {"hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32, "vision_layers": 1},
    "task_settings": {**SMALL["task_settings"], "base_maps": {3: 4}, "maps": {3: 4}, "test_maps": {3: 3}},
    "evaluation": {**SMALL["evaluation"], "batch_size": 3, "controls": 2},
    "training": {**SMALL["training"], "per_device_train_batch_size": 2, "logging_steps": 1, "disable_tqdm": True},
    **{phase: {**SMALL[phase], "max_steps": steps} for phase, steps in (("base", 2), ("stage1", 1), ("stage2", 1))},
}


def parse(path, *arguments):
    return read_recipe(build_parser().parse_args(["train", str(path), *arguments]))


def test_the_main_job(tmp_path, capfd, monkeypatch):
    """Base, control, both stages, evaluation, cards, picture, and the reload in a fresh process, which compares."""
    recipe_file = tmp_path / "tiny.yaml"
    recipe_file.write_text(yaml.safe_dump({**TINY, "output_dir": str(tmp_path / "run")}))
    done, train_phase, evaluate = [], train.train, train.evaluate_checkpoints
    monkeypatch.setattr(train, "train", lambda *args: done.append(args[0]) or train_phase(*args))
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda self: done.append("group closed"))
    monkeypatch.setattr(train, "evaluate_checkpoints", lambda *a, **k: done.append("evaluation") or evaluate(*a, **k))
    train.run_recipe(parse(recipe_file))
    assert done == ["base", "answer_only", "stage1", "stage2", "group closed", "evaluation"]
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    assert list(results) == ["base", "answer_only", "stage1", "stage2"]
    assert all(scores["count_3x3"] == 3 for scores in results.values())
    state = {phase: json.loads((run / phase / "trainer_state.json").read_text()) for phase in results}
    assert state["answer_only"]["global_step"] == state["stage1"]["global_step"] + state["stage2"]["global_step"]
    assert (run / "latents.png").stat().st_size > 10_000 and (run / "curves.png").stat().st_size > 10_000
    for phase in results:
        assert "| FrozenLake planning 3x3 | end_on_goal |" in (run / phase / "README.md").read_text()
    shown = capfd.readouterr().out
    assert "the same 3 answers" in shown and "| own latents | another sample's | mean latent |" in shown
    controls = json.loads((run / "controls.json").read_text())
    assert list(controls) == ["stage1", "stage2"] and controls["stage2"]["accuracy"]["count"] == 2
    cards = {phase: (run / phase / "README.md").read_text() for phase in results}
    assert {phase for phase, card in cards.items() if "| another sample's | end_on_goal |" in card} == set(controls)


def test_the_recipe_of_make_train_and_rewards_after_it(tmp_path, capfd):
    """With its control in words, targets by the answer's gradient, and the controls of its latents in the table."""
    shifts = yaml.safe_load((RECIPES / "shifts_small.yaml").read_text())
    training = {**shifts["training"], "per_device_train_batch_size": 2, "logging_steps": 1, "disable_tqdm": True}
    training |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}}
    phases = ("base", "answer_only", "text", "stage1", "stage2")
    settings = {"boards": 4, "base_boards": 4, "test_boards": 6, "lengths": [1, 2], "number_from": [1, 1]}
    tiny = {
        **shifts,
        "training": training,
        "output_dir": str(tmp_path / "run"),
        "small_backbone": {**shifts["small_backbone"], "hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32},
        "task_settings": {**shifts["task_settings"], **settings},
        "evaluation": {**shifts["evaluation"], "batch_size": 3, "controls": 3},
        "swap_gap": {"every": 2, "num_samples": 2},
        **{phase: {**shifts[phase], "max_steps": 2, "lr_scheduler_kwargs": {}} for phase in phases},
        "grpo": {
            "rewards": ["accuracy", "format", "span"],
            "task_settings": {"lengths": [3, 3], "listed": [1, 1]},
            "max_steps": 1,
            "num_generations": 2,
            "max_completion_length": 8,
            "learning_rate": 0.0,
        },
    }
    recipe_file = tmp_path / "tiny.yaml"
    recipe_file.write_text(yaml.safe_dump(tiny))
    train.run_recipe(parse(recipe_file))
    run = tmp_path / "run"
    assert list(json.loads((run / "results.json").read_text())) == [*phases, "grpo"]
    heading, _, *lines = (run / "results.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[:6]] == [f"| {phase}" for phase in (*phases, "grpo")]
    assert "another sample's" in heading and "zeros" in heading
    config = json.loads((run / "stage1" / "config.json").read_text())
    base = json.loads((run / "base" / "config.json").read_text())
    assert config["latent_head"] == "rescale" and config["latent_norm"] != base["latent_norm"]  # measured by stage 1
    states = {phase: json.loads((run / phase / "trainer_state.json").read_text()) for phase in (*phases, "grpo")}
    logs = {phase: state["log_history"] for phase, state in states.items()}
    assert {"rewards/accuracy/mean", "rewards/format_reward/mean", "rewards/opens_span/mean"} <= set(logs["grpo"][1])
    gaps = {phase: [line["step"] for line in lines if "eval_swap_gap" in line] for phase, lines in logs.items()}
    assert gaps == {"base": [], "answer_only": [], "text": [], "stage1": [0, 2], "stage2": [0, 2], "grpo": [0]}
    rewarded, stage2 = ((run / phase / "model.safetensors").read_bytes() for phase in ("grpo", "stage2"))
    assert rewarded == stage2  # it goes on from there, here at a rate of 0
    assert "GRPO" in (run / "grpo" / "README.md").read_text()
    printed = capfd.readouterr().out
    assert "the same 6 answers" in printed
    command = shlex.split(next(line for line in printed.splitlines() if line.startswith("ilvr generate ")))
    assert main(command[1:]) == 0 and command[2] == str(run / "grpo")


def test_the_main_job_in_two_processes(tmp_path):
    """The script itself: each phase reads what process 0 wrote of the one before; one process evaluates and prints."""
    training = {**TINY["training"], "per_device_train_batch_size": 1, "ddp_backend": "gloo"}
    recipe_file = tmp_path / "tiny.yaml"
    recipe_file.write_text(yaml.safe_dump({**TINY, "training": training, "output_dir": str(tmp_path / "run")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "train_ilvr.py"), "--config", str(recipe_file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-20000:]
    for heading in ("=== stage1 ===", "=== stage2 ===", "=== evaluation ===", "the same 3 answers"):
        assert done.stdout.count(heading) == 1, heading
    assert json.loads((tmp_path / "run" / "results.json").read_text())["stage2"]["count"] == 3
    assert (tmp_path / "run" / "latents.png").exists()


def test_the_main_job_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Finished phases are not trained again; the one that was cut off goes on from its last whole checkpoint."""
    recipe_file = tmp_path / "tiny.yaml"
    training = {**TINY["training"], "save_strategy": "steps", "save_steps": 1}
    phases = {"training": training, "answer_only": {}, "stage2": {"max_steps": 3}}
    recipe_file.write_text(yaml.safe_dump({**TINY, **phases, "output_dir": str(tmp_path / "run")}))
    monkeypatch.setattr(train, "evaluate_checkpoints", lambda *_, **__: None)
    train.run_recipe(parse(recipe_file))
    stage2 = tmp_path / "run" / "stage2"
    expected = (stage2 / "model.safetensors").read_bytes()
    for lost in (
        stage2 / "trainer_state.json",
        stage2 / "model.safetensors",
        stage2 / "checkpoint-3" / "optimizer.pt",
    ):
        lost.unlink()
    trained = []
    own = train.ILVRTrainer.train

    def record(trainer, resume_from_checkpoint):
        trained.append(resume_from_checkpoint)
        return own(trainer, resume_from_checkpoint)

    monkeypatch.setattr(train.ILVRTrainer, "train", record)
    train.run_recipe(parse(recipe_file, "--resume", "true"))
    assert trained == [str(stage2 / "checkpoint-2")]
    assert (stage2 / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    "grpo, message",
    [
        ({"rewards": ["beauty"]}, "no rewards beauty; choose from accuracy, format, span"),
        ({"num_generations": 3, "per_device_train_batch_size": 2}, r"grpo \(with `training`\): .*num_generations"),
        ({"task_settings": {"length": 3}}, "length"),
    ],
)
def test_wrong_rewards_are_refused_before_the_first_phase(tmp_path, monkeypatch, grpo, message):
    monkeypatch.setattr(train, "train", None)
    shifts = yaml.safe_load((RECIPES / "shifts_small.yaml").read_text())
    small = {**shifts["small_backbone"], "hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32}
    recipe = {**shifts, "small_backbone": small, "output_dir": str(tmp_path / "run"), "grpo": grpo}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises((ValueError, TypeError), match=message):
        train.run_recipe(parse(tmp_path / "tiny.yaml"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 10}, "asks two test questions or more"),
        ({"num_samples": 8}, "takes `every`"),
        ({"every": 0}, "takes `every`"),
        ({"every": 10, "num_samples": 1}, "takes `every`"),
        ({"every": 10, "sampels": 8}, "takes `every`"),
    ],
)
def test_a_swap_gap_that_cannot_be_measured_is_refused_before_the_first_phase(tmp_path, settings, message):
    for image in ("board.png", "step.png"):
        make_image("red").save(tmp_path / image)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ("--output_dir", str(tmp_path / "run"), "--dataset", str(tmp_path / "train.jsonl"))
    recipe = parse(RECIPES / "qwen2_5_vl_7b.yaml", *options)
    recipe.swap_gap, recipe.training["bf16"] = settings, False
    with pytest.raises(ValueError, match=message):
        train.run_recipe(recipe)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_parse_and_every_phase_is_valid(path, tmp_path):
    recipe = parse(path, "--output_dir", str(tmp_path), "--dataset", "some/dataset")
    recipe.training["bf16"] = False  # for the machine to refuse that has it not
    phases = phases_of(recipe)
    if recipe.model is None:
        assert list(phases)[-2:] == ["stage1", "stage2"]
        assert list(phases)[:-2] in ([], ["base", "answer_only"], ["base", "answer_only", "text"])
    else:
        assert list(phases) == ["grpo"]
    for phase, settings in phases.items():
        assert settings.get("stage") == {"stage1": 1, "grpo": None}.get(phase, 2)
        assert settings["output_dir"] == f"{tmp_path}/{phase}"


ROWS = [
    {
        "text_input": "Plan <image>",
        "image_input": ["board.png"],
        "sequence_plan": [
            {"type": "text", "content": "Right"},
            {"type": "latent", "helper_image": "step.png"},
            {"type": "text", "content": "Up \\boxed{R U}"},
        ],
        "original_final_answer": "R U",
    }
] * 2


@pytest.mark.parametrize("name", ["qwen2_5_vl_7b", "qwen2_5_vl_7b_lora", "qwen2_5_vl_3b_lora"])
def test_recipes_of_real_backbones_run_on_a_tiny_one(name, backbone_dir, tmp_path):
    """Everything but backbone, data, the number of steps and of words as in the recipe."""
    for image in ("board.png", "step.png"):
        make_image("red").save(tmp_path / image)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = parse(
        RECIPES / f"{name}.yaml",
        *("--output_dir", str(tmp_path / "run"), "--dataset", str(tmp_path / "train.jsonl")),
        *("--backbone", str(backbone_dir)),
    )
    recipe.training |= {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    recipe.evaluation = {"max_new_tokens": 3, "controls": 1}
    train.run_recipe(recipe)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [scores["count"] for scores in results.values()] == [1, 1]  # of the two samples one is held out
    saved = tmp_path / "run" / ("merged" if recipe.lora else "stage2")
    model = ILVRForConditionalGeneration.from_pretrained(saved)
    assert model.config.latent_size == 8 and model.dtype == torch.bfloat16
    adapter = (tmp_path / "run" / "stage2" / "adapter_model.safetensors").exists()
    assert adapter == bool(recipe.lora)
    card = ILVRModelCard.load(saved)
    assert not card.is_adapter and f'from_pretrained("{saved.name}"' in (saved / "README.md").read_text()
    assert [result.value for result in card.results] == [results["stage2"][result.metric] for result in card.results]
    push.choose_files(saved)
    for stage in ("stage1", "stage2"):
        state = json.loads((tmp_path / "run" / stage / "trainer_state.json").read_text())
        assert state["global_step"] == 1


def test_the_7b_recipe_builds_on_the_meta_device(tmp_path):
    """The published sizes of Qwen2.5-VL-7B; with the vision tower frozen, Qwen2.5-7B's 7,615,616,512 weights train."""
    recipe = parse(RECIPES / "qwen2_5_vl_7b.yaml", "--dataset", "some/dataset")
    assert recipe.backbone == "Qwen/Qwen2.5-VL-7B-Instruct" and recipe.dataset == "some/dataset"
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584}
    config = ILVRConfig(
        vlm_config=Qwen2_5_VLConfig(text_config=text, vision_config=vision),
        latent_size=recipe.latent_size,
        latent_head=recipe.latent_head,
        latent_start_token_id=151665,
        latent_pad_token_id=151666,
        latent_end_token_id=151667,
    )
    with torch.device("meta"):
        model = ILVRForConditionalGeneration(config)
    assert model.num_parameters() == 8_292_166_656
    freeze_vision_tower(model)
    assert model.num_parameters(only_trainable=True) == 7_615_616_512


def test_a_recipe_with_an_unknown_field_is_refused(tmp_path):
    (tmp_path / "typo.yaml").write_text("latent_sise: 4\n")
    with pytest.raises(ValueError, match="latent_sise"):
        parse(tmp_path / "typo.yaml")


def test_a_wrong_argument_of_a_late_phase_is_found_before_the_first(tmp_path, monkeypatch):
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({**TINY, "stage2": {"max_steps": 1, "learing_rate": 1.0}}))
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("a phase was trained"))
    with pytest.raises(ValueError, match="stage2 .*learing_rate"):
        train.run_recipe(parse(tmp_path / "typo.yaml", "--output_dir", str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(), "nothing to train on.*examples/recipes; or --dataset"),
        (Recipe(dataset="rows.jsonl"), "Without a task .* Name a --backbone"),
        (Recipe(task="frozen_lake", answer_only={"seed": 1}), "`answer_only` continues `base`"),
    ],
)
def test_recipes_that_name_too_little_are_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        train.run_recipe(recipe)
