"""`ilvr train RECIPE`: trains, evaluates, saves and reloads an ILVR model: the main job.

A recipe without `backbone` builds a small Qwen and teaches it to see first (`base`). Stage 2 continues stage 1. Two
controls continue the same base for as many steps: `answer_only` without traces, `text` with words in place of latents.
With `grpo`, rewards continue stage 2.
With `lora` the backbone stays as it is: both stages train one adapter, which is merged in the end.
With `model` training goes on from an ILVR model, by the stages that have settings.
"""

from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import TrainerState

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.data import load_conversations
from ilvr.evaluation import Questions, SwapGapCallback, evaluate_checkpoints
from ilvr.hub_cards import ILVRModelCard
from ilvr.tasks import Task, load_task
from ilvr.tasks.small_qwen import build_small_qwen
from ilvr.trainer import ILVRGRPOConfig, ILVRGRPOTrainer, ILVRTrainer, ILVRTrainingConfig, make_prompts
from ilvr.trainer.rewards import load_rewards
from ilvr.trainer.running.checkpoints import last_whole_checkpoint
from ilvr.trainer.running.loading import load_model, load_processor

from .launching import launch
from .own_data import load_own_data
from .recipe import Recipe, phases_of, read_recipe


START = "start"  # in the table of scores, the model that training went on from
FORMS = {
    "base": "base",
    "answer_only": "answer",
    "text": "text",
    "stage1": "trace",
    "stage2": "trace",
    "grpo": "trace",
    START: "trace",
}
BEFORE = {"stage2": ["stage1"], "grpo": ["stage2", "stage1"]}  # the others continue the base
REWARDS = ["accuracy", "format"]


def make_trainer(
    settings: dict[str, Any],
    data: Any,
    model: Any,
    processor: ILVRProcessor,
    *,
    lora: dict[str, Any],
    rewards: list[Any] | None = None,
) -> ILVRTrainer | ILVRGRPOTrainer:
    """The trainer of a phase; with `rewards` the data are prompts."""
    both: dict[str, Any] = {"train_dataset": data, "processing_class": processor}
    if rewards is not None:
        return ILVRGRPOTrainer(model, rewards, ILVRGRPOConfig(**settings), **both)
    adapter = LoraConfig(**lora) if lora and not isinstance(model, PeftModel) else None
    return ILVRTrainer(model, ILVRTrainingConfig(**settings), peft_config=adapter, **both)


def train(phase: str, trainer: Any, settings: dict[str, Any], recipe: Recipe) -> ILVRModelCard:
    """Runs one phase, saves its checkpoint in a folder of its name and returns its card."""
    trainer.accelerator.print(f"\n=== {phase} ===", flush=True)
    state = Path(settings["output_dir"], "trainer_state.json")  # saved last
    if recipe.resume and state.exists():
        trainer.accelerator.print("already trained", flush=True)
        trainer.state = TrainerState.load_from_json(str(state))
    else:
        state.unlink(missing_ok=True)
        trainer.train(resume_from_checkpoint=recipe.resume and last_whole_checkpoint(settings["output_dir"]))
        trainer.save_model()
        trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # the next phase reads what process 0 writes
    return trainer.model_card()


def backbone_of(recipe: Recipe) -> str:
    return recipe.backbone or f"{recipe.output_dir}/backbone"


def start(recipe: Recipe) -> tuple[Any, ILVRProcessor]:
    """The model and processor that training starts from."""
    if recipe.model is not None:
        return load(recipe, START), load_processor(recipe.model)
    backbone = backbone_of(recipe)
    torch.manual_seed(recipe.seed)  # a new latent head has the same weights in each process
    options: dict[str, Any] = {"latent_size": recipe.latent_size}
    processor = ILVRProcessor.from_backbone(backbone, **options)
    options |= {"latent_head": recipe.latent_head, **recipe.model_kwargs}
    return ILVRForConditionalGeneration.from_backbone(backbone, **options), processor


def load(recipe: Recipe, phase: str) -> Any:
    """What a phase saved, or what training started from: a model, or an adapter over the backbone."""
    adapter: dict[str, Any] = {"backbone": backbone_of(recipe)} if recipe.lora else {}
    source = recipe.model if recipe.model and phase == START else f"{recipe.output_dir}/{phase}"
    return load_model(source, **adapter, **recipe.model_kwargs)


def load_whole(recipe: Recipe, phase: str) -> Any:
    """The same, with an adapter merged into the model."""
    model = load(recipe, phase)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def load_data(recipe: Recipe) -> tuple[Any, Task | None]:
    """The user's own training data, if there are any; and the task that tests and, without such data, trains."""
    if recipe.task is not None:
        task = load_task(recipe.task, **{"seed": recipe.seed, **recipe.task_settings})
        own = None if recipe.dataset is None else load_conversations(recipe.dataset, **recipe.dataset_kwargs)
        return own, task
    with PartialState().main_process_first():  # the others read its cache
        return load_own_data(recipe)


def rewarded(recipe: Recipe, own: Any, task: Task | None, processor: ILVRProcessor) -> tuple[list[Any], Dataset]:
    """Rewards, and the prompts they are given for: of the user's own data, or of the task in settings of their own.

    Raises:
        ValueError: for rewards and settings that there are not, and for a streaming data set.
    """
    metric = recipe.metric if task is None else task.metric
    rewards = load_rewards(recipe.grpo.get("rewards", REWARDS), metric=metric, processor=processor)
    if own is None and recipe.task is not None:
        settings = {**recipe.task_settings, **recipe.grpo.get("task_settings", {})}
        asked = load_task(recipe.task, **{"seed": recipe.seed, **settings})
        return rewards, make_prompts(asked.dataset("train"), asked.reference)
    if not isinstance(own, Dataset):
        raise ValueError("grpo needs its questions at hand, and no stream. Leave out streaming, or grpo.")
    return rewards, make_prompts(own)


def run(options: Namespace) -> int:
    """Trains by a recipe, here or in the processes of a launcher."""
    if options.accelerate_config is not None:
        launch(options.arguments, options.accelerate_config, options.num_processes)
        return 0
    run_recipe(read_recipe(options))
    return 0


def run_recipe(recipe: Recipe) -> None:
    """Trains all phases of a recipe, then scores what they saved on the same questions and writes a report.

    Raises:
        ValueError: before the first phase, if one of them or the data are wrong.
    """
    phases = phases_of(recipe)
    own, task = load_data(recipe)
    if recipe.swap_gap and (task is None or len(task.dataset("test")) < 2):
        raise ValueError("swap_gap asks two test questions or more, which there are not. Add some, or leave it out.")
    if recipe.backbone is None and recipe.model is None and PartialState().is_main_process:
        torch.manual_seed(recipe.seed)
        build_small_qwen(f"{recipe.output_dir}/backbone", task.texts(), **recipe.small_backbone)
    PartialState().wait_for_everyone()
    model, processor = start(recipe)
    rewards, prompts = rewarded(recipe, own, task, processor) if recipe.grpo else (None, None)
    cards: dict[str, ILVRModelCard] = {}
    for phase, settings in phases.items():
        before = next((name for name in BEFORE.get(phase, ["base"]) if name in cards), None)
        if before is not None:
            model = load(recipe, before)
        if phase == "base":
            # The patch projection stays random: its gradient is half a step on a CPU, and boards need no better one.
            model.vlm.model.visual.patch_embed.requires_grad_(False)
        if phase == "grpo":
            trainer = make_trainer(settings, prompts, model, processor, lora=recipe.lora, rewards=rewards)
        else:
            data = own
            if own is None:
                data = task.dataset("train", FORMS[phase])
                settings = {"helper_question": task.helper_question, **settings}
            trainer = make_trainer(settings, data, model, processor, lora=recipe.lora)
        if recipe.swap_gap and task is not None and FORMS[phase] == "trace":
            asked = {name: value for name, value in recipe.evaluation.items() if name != "controls"}
            questions = Questions.of_task(task)
            trainer.add_callback(SwapGapCallback(trainer, questions, **{**asked, **recipe.swap_gap}))
        cards[phase] = train(phase, trainer, settings, recipe)
    # The others leave without a barrier, which an evaluation may well outlast; a group that is left open can abort a
    # process that ends, as https://github.com/pytorch/pytorch/pull/179291 describes.
    PartialState().destroy_process_group()
    if not PartialState().is_main_process:
        return
    (model,) = release_memory(model)
    if recipe.lora:
        load_whole(recipe, list(cards)[-1]).save_pretrained(f"{recipe.output_dir}/merged")
        processor.save_pretrained(f"{recipe.output_dir}/merged")
        save_merged_card(recipe, cards)
    if task is not None:
        print("\n=== evaluation ===", flush=True)
        given = {} if recipe.model is None else {START: None}
        scored: dict[str, ILVRModelCard | None] = {**given, **cards}
        evaluate_checkpoints(
            *(task, scored, recipe.output_dir),
            forms={phase: "answer" if phase == "base" else FORMS[phase] for phase in scored},
            load=partial(load_whole, recipe),
            reload=recipe.backbone is None and recipe.model is None,
            **recipe.evaluation,
        )
        if recipe.lora:
            save_merged_card(recipe, cards)  # again, with the results


def save_merged_card(recipe: Recipe, cards: dict[str, ILVRModelCard]) -> None:
    """The card of the last phase for the model that its adapter was merged into."""
    replace(list(cards.values())[-1], model_name="merged", is_adapter=False).save(f"{recipe.output_dir}/merged")
