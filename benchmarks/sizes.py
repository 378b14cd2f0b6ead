"""Randomly initialised checkpoints of published sizes, with a small tokenizer: for a GPU without weights at hand."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ilvr.tasks.small_qwen import train_tokenizer

from .model import IMAGE_SIZE, WORDS


OFFICIAL = Path(__file__).parents[1] / "tests" / "official"  # the configs that the Hub has
# The decoder of Qwen2.5-0.5B with a tower of that share.
HALF_BILLION = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
}
HALF_BILLION_TOWER = {
    "hidden_size": 640,
    "depth": 16,
    "intermediate_size": 1708,
    "num_heads": 8,
    "out_hidden_size": 896,
}


def config_of(name: str) -> dict:
    """The config of `qwen2_5_vl_3b`, `qwen3_vl_4b` and so on, or of `qwen2_5_vl_0.5b`."""
    if name == "qwen2_5_vl_0.5b":
        config = config_of("qwen2_5_vl_3b")
        tower = {**config["vision_config"], **HALF_BILLION_TOWER}
        return {**config, **HALF_BILLION, "vision_config": tower}
    return json.loads((OFFICIAL / f"{name}.json").read_text())["config"]


def build(folder: Path, name: str) -> None:
    """Saves a checkpoint of that size in bf16, drawn on the GPU if there is one."""
    config = config_of(name)
    tokenizer = train_tokenizer([" ".join(["", *WORDS])] * 20)
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    config |= {key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()}
    for part in (config, config.get("text_config", {})):
        part |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**config)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    patch_size = config.vision_config.patch_size
    size = {"shortest_edge": 4 * patch_size**2, "longest_edge": IMAGE_SIZE**2}
    image_processor = Qwen2VLImageProcessorPil(patch_size=patch_size, temporal_patch_size=2, merge_size=2, size=size)
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)
