"""A small Qwen2.5-VL or Qwen3-VL from its config, with a tokenizer trained in place: a backbone without a GPU."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text }}{% endif %}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def train_tokenizer(
    texts: list[str],
    vocab_size: int = 2048,
    special_tokens: list[str] = SPECIAL_TOKENS,
    chat_template: str = CHAT_TEMPLATE,
    eos_token: str = "<|im_end|>",
    pad_token: str = "<|endoftext|>",
    **kwargs: Any,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens, or those of another backbone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "user\n assistant\n system\n"] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token=pad_token,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        **kwargs,
    )


def build_small_qwen(
    output_dir: str | Path,
    texts: list[str],
    *,
    family: str = "qwen2_5_vl",
    hidden_size: int = 128,
    num_layers: int = 4,
    vision_hidden_size: int = 64,
    vision_layers: int = 2,
    patch_size: int = 32,
    position_std: float = 0.3,
    deepstack: bool = True,
) -> None:
    """Saves a randomly initialised Qwen with tokenizer and image processor, loadable like any checkpoint.

    One visual token covers `2 * patch_size` pixels in each direction; the default is one cell of a board. Seed torch
    before the call.

    Args:
        family (`str`, *optional*, defaults to `"qwen2_5_vl"`): or `"qwen3_vl"`, whose tower has learned positions: its
            features say where a patch is. In a single layer they would drown in the pixels at their usual size.
        position_std (`float`, *optional*, defaults to 0.3): standard deviation of these positions.
        deepstack (`bool`, *optional*, defaults to `True`): whether `"qwen3_vl"` adds the first vision layer's features
            to the decoder's first layer as well. Latents get no such addition: without it all that the decoder reads
            of a patch is in the feature that latents are aligned with.
    """
    tokenizer = train_tokenizer(texts)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    num_heads = hidden_size // 32
    head_dim = hidden_size // num_heads
    text_config: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6],
        },
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision_config: dict[str, Any] = {
        "depth": vision_layers,
        "hidden_size": vision_hidden_size,
        "intermediate_size": 2 * vision_hidden_size,
        "num_heads": max(1, vision_hidden_size // 32),
        "patch_size": patch_size,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "out_hidden_size": hidden_size,
    }
    shared: dict[str, Any] = {
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }
    if family == "qwen2_5_vl":
        vision_config |= {
            "window_size": 8 * 2 * patch_size,
            "fullatt_block_indexes": list(range(vision_layers)),
        }
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**shared))
    elif family == "qwen3_vl":
        text_config |= {"head_dim": head_dim, "tie_word_embeddings": True}
        vision_config |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0] if deepstack else []}
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**shared))
        torch.nn.init.normal_(model.model.visual.pos_embed.weight, std=position_std)
    else:
        raise ValueError(f"`family` must be 'qwen2_5_vl' or 'qwen3_vl', got {family!r}.")
    model.generation_config.update(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], bos_token_id=None
    )
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        temporal_patch_size=1,
        merge_size=2,
        size={"shortest_edge": (2 * patch_size) ** 2, "longest_edge": (16 * patch_size) ** 2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(output_dir)
