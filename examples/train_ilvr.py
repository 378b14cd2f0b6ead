"""Trains, evaluates, saves and reloads an ILVR model: the main job.

    python examples/train_ilvr.py --config examples/recipes/frozen_lake_small.yaml
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_ilvr.py \\
        --config examples/recipes/qwen2_5_vl_7b.yaml --dataset data/train.jsonl

A recipe without `backbone` builds a small Qwen2.5-VL and teaches it to see first (`base`). Stage 2 continues stage 1;
`answer_only` continues the same base on answers without traces, for as many steps, as the control. With `lora` the
backbone stays as it is: both stages train one adapter, which is merged in the end.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from evaluate_frozen_lake import evaluate_frozen_lake
from peft import LoraConfig, PeftModel
from small_qwen import build_small_qwen
from transformers import TrainerState
from trl import TrlParser

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.data import load_conversations
from ilvr.hub_cards import ILVRModelCard
from ilvr.tasks.frozen_lake import frozen_lake_dataset
from ilvr.tasks.frozen_lake.conversations import vocabulary
from ilvr.trainer import ILVRTrainer, ILVRTrainingConfig
from ilvr.trainer.running.checkpoints import last_whole_checkpoint


@dataclass
class Recipe:
    """What is trained on what. Each phase is a dict of `ILVRTrainingConfig` arguments, on top of `training`."""

    output_dir: str = field(default="runs/ilvr", metadata={"help": "Folder of checkpoints, pictures and results."})
    backbone: str | None = field(default=None, metadata={"help": "Hub id or folder of a vision-language model."})
    small_backbone: dict = field(
        default_factory=dict, metadata={"help": "Sizes of the backbone built if none is named."}
    )
    model_kwargs: dict = field(default_factory=dict, metadata={"help": "Arguments of from_pretrained."})
    latent_size: int = field(default=8, metadata={"help": "Latents in a span."})
    latent_head: str = field(default="identity", metadata={"help": "identity, linear or mlp."})
    dataset: str | None = field(default=None, metadata={"help": "File, folder or Hub id for `load_conversations`."})
    dataset_kwargs: dict = field(default_factory=dict, metadata={"help": "Further arguments of it: image_root, …"})
    frozen_lake: dict = field(default_factory=dict, metadata={"help": "FrozenLake maps, if there is no dataset."})
    lora: dict = field(default_factory=dict, metadata={"help": "LoraConfig of the adapter; none: all weights train."})
    resume: bool = field(default=False, metadata={"help": "Whether phases go on from their last whole checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, maps and the order of the data."})
    training: dict = field(default_factory=dict, metadata={"help": "Training arguments of all phases."})
    base: dict = field(default_factory=dict, metadata={"help": "The phase that makes a small backbone see."})
    answer_only: dict = field(default_factory=dict, metadata={"help": "The control without traces."})
    stage1: dict = field(default_factory=dict, metadata={"help": "Alignment with the momentum teacher."})
    stage2: dict = field(default_factory=dict, metadata={"help": "Training through the model's own latents."})


def load_data(recipe: Recipe, phase: str):
    """The conversations of a phase, from the recipe's data set or rendered FrozenLake maps."""
    if recipe.dataset is not None:
        return load_conversations(recipe.dataset, **recipe.dataset_kwargs)
    tasks = {"base": recipe.frozen_lake["base_tasks"], "answer_only": ["plan"]}.get(phase, ["plan_trace"])
    maps = recipe.frozen_lake["base_maps" if phase == "base" else "maps"]
    return frozen_lake_dataset(maps, tasks=tasks, split="train", seed=recipe.seed)


def load(recipe: Recipe, phase: str):
    """What a phase saved: a model, or an adapter over the backbone."""
    folder = f"{recipe.output_dir}/{phase}"
    if recipe.lora:
        return PeftModel.from_pretrained(start(recipe)[0], folder, is_trainable=True)
    return ILVRForConditionalGeneration.from_pretrained(folder, **recipe.model_kwargs)


def train(recipe: Recipe, phase: str, model, processor) -> ILVRModelCard:
    """Runs one phase, saves its checkpoint in a folder of its name and returns its card."""
    print(f"\n=== {phase} ===", flush=True)
    folder = f"{recipe.output_dir}/{phase}"
    settings = {
        "stage": 1 if phase == "stage1" else 2,
        "seed": recipe.seed,
        **recipe.training,
        **getattr(recipe, phase),
    }
    trainer = ILVRTrainer(
        model,
        ILVRTrainingConfig(folder, **settings),
        train_dataset=load_data(recipe, phase),
        processing_class=processor,
        peft_config=LoraConfig(**recipe.lora) if recipe.lora and not is_peft_model(model) else None,
    )
    state = Path(folder, "trainer_state.json")  # saved last
    if recipe.resume and state.exists():
        print("already trained", flush=True)
        trainer.state = TrainerState.load_from_json(state)
    else:
        state.unlink(missing_ok=True)
        trainer.train(resume_from_checkpoint=recipe.resume and last_whole_checkpoint(folder))
        trainer.save_model()
        trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # the next phase reads what process 0 writes
    return trainer.model_card()


def start(recipe: Recipe):
    """The model and processor that training starts from."""
    backbone = recipe.backbone
    if backbone is None:
        backbone = f"{recipe.output_dir}/backbone"
        torch.manual_seed(recipe.seed)
        build_small_qwen(backbone, vocabulary(), **recipe.small_backbone)
    options = {"latent_size": recipe.latent_size}
    processor = ILVRProcessor.from_backbone(backbone, **options)
    options |= {"latent_head": recipe.latent_head, **recipe.model_kwargs}
    return ILVRForConditionalGeneration.from_backbone(backbone, **options), processor


def main(recipe: Recipe):
    model, processor = start(recipe)
    cards = {}
    if recipe.base:
        # The patch projection stays random: its gradient is half a step on a CPU, and boards need no better one.
        model.vlm.model.visual.patch_embed.requires_grad_(False)
        cards["base"] = train(recipe, "base", model, processor)
        model = load(recipe, "base")
    if recipe.answer_only:
        recipe.answer_only["max_steps"] = recipe.stage1["max_steps"] + recipe.stage2["max_steps"]
        cards["answer_only"] = train(recipe, "answer_only", load(recipe, "base"), processor)
    cards["stage1"] = train(recipe, "stage1", model, processor)
    cards["stage2"] = train(recipe, "stage2", load(recipe, "stage1"), processor)
    if recipe.lora:
        load(recipe, "stage2").merge_and_unload().save_pretrained(f"{recipe.output_dir}/merged")
        processor.save_pretrained(f"{recipe.output_dir}/merged")
    if recipe.frozen_lake:
        evaluate_frozen_lake(cards, processor, recipe)


if __name__ == "__main__":
    main(*TrlParser((Recipe,)).parse_args_and_config())
