"""Tiny random checkpoints of the backbones under test: weights, tokenizer and processor, saved like any checkpoint."""

import json

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from ilvr.tasks.small_qwen import SPECIAL_TOKENS, build_small_qwen, train_tokenizer


TEXTS = ["Right Down Left Up \\boxed{R D L U} Plan a path to the goal."]
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
COLON_TEMPLATE = (
    "{{ BEGIN }}{% for m in messages %}{{ m.role.capitalize() + ':' }}"
    "{% if m.content[0].type != 'image' %}{{ ' ' }}{% endif %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{{ '<end_of_utterance>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
COLON_TOKENS = ["<pad>", "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
# LLaVA-OneVision renders all images of a turn before its texts: a format of its own.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{% for p in m.content %}{{ '<|latent_start|>' + '<|latent_pad|>' * 3 + '<|latent_end|>' if p.type == 'image' "
    "else p.text }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{{ '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _save(folder, model_class, config, tokenizer, image_processor, processor_config=None):
    model = model_class(config)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)
    if processor_config:
        (folder / "processor_config.json").write_text(json.dumps(processor_config))


def _ids(tokenizer, **names) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def build_qwen2_5_vl(folder):
    build_small_qwen(folder, TEXTS, hidden_size=32, num_layers=2, vision_hidden_size=32, vision_layers=1, patch_size=8)


def _build_qwen3(folder, model_class, config_class, text, **vision):
    tokenizer = train_tokenizer(TEXTS)
    config = config_class(
        text_config={
            **DECODER,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                **text.pop("rope"),
            },
            **text,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "temporal_patch_size": 1,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            **vision,
        },
        tie_word_embeddings=True,
        **_ids(
            tokenizer,
            image_token_id="<|image_pad|>",
            video_token_id="<|video_pad|>",
            vision_start_token_id="<|vision_start|>",
            vision_end_token_id="<|vision_end|>",
        ),
    )
    size = {"shortest_edge": 16**2, "longest_edge": 128**2}
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, temporal_patch_size=1, merge_size=2, size=size, **PIXELS)
    _save(folder, model_class, config, tokenizer, image_processor)


def build_qwen3_vl(folder):
    text = {"rope": {}}
    _build_qwen3(folder, Qwen3VLForConditionalGeneration, Qwen3VLConfig, text, deepstack_visual_indexes=[0, 1])


def build_qwen3_5(folder):
    text = {
        "rope": {"partial_rotary_factor": 1.0},
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    _build_qwen3(folder, Qwen3_5ForConditionalGeneration, Qwen3_5Config, text)


def _build_colon(folder, model_class, config_class, image_processor_class, processor_class, begin):
    tokens = [*COLON_TOKENS, begin, *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))]
    tokenizer = train_tokenizer(
        TEXTS,
        special_tokens=tokens,
        chat_template=COLON_TEMPLATE.replace("BEGIN", repr(begin)),
        eos_token="<end_of_utterance>",
        pad_token="<pad>",
    )
    config = config_class(
        text_config={**DECODER, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0},
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        **_ids(tokenizer, image_token_id="<image>"),
    )
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = {"processor_class": processor_class, "image_seq_len": 4}
    _save(folder, model_class, config, tokenizer, image_processor_class(**sizes, **PIXELS), processor)


def build_smolvlm(folder):
    classes = (SmolVLMForConditionalGeneration, SmolVLMConfig, SmolVLMImageProcessorPil, "SmolVLMProcessor")
    _build_colon(folder, *classes, begin="<|im_start|>")


def build_idefics3(folder):
    classes = (Idefics3ForConditionalGeneration, Idefics3Config, Idefics3ImageProcessorPil, "Idefics3Processor")
    _build_colon(folder, *classes, begin="<|begin_of_text|>")


def build_llava_onevision(folder):
    tokenizer = train_tokenizer(TEXTS, special_tokens=[*SPECIAL_TOKENS, "<image>", "<video>"])
    config = LlavaOnevisionConfig(
        text_config={**DECODER, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8},
        image_grid_pinpoints=[[16, 16], [32, 32]],
        tie_word_embeddings=True,
        **_ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    size = {"height": 16, "width": 16}
    image_processor = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[16, 16], [32, 32]], **PIXELS)
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 4,
        "vision_feature_select_strategy": "full",
    }
    _save(folder, LlavaOnevisionForConditionalGeneration, config, tokenizer, image_processor, processor)


def build_internvl(folder):
    images = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokens = [*SPECIAL_TOKENS, *images.values(), "<video>"]
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}"
        "{{ '<IMG_CONTEXT>\n' if p.type == 'image' else p.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    extra = {**images, "video_token": "<video>"}
    tokenizer = train_tokenizer(TEXTS, special_tokens=tokens, chat_template=template, extra_special_tokens=extra)
    config = InternVLConfig(
        text_config={**DECODER, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        tie_word_embeddings=True,
        **_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    image_processor = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=2, **PIXELS)
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    _save(folder, InternVLForConditionalGeneration, config, tokenizer, image_processor, processor)


def build_gemma3(folder):
    images = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokens = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *images.values()]
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{% for p in m.content %}"
        "{{ '<start_of_image>' if p.type == 'image' else p.text | trim }}{% endfor %}{{ '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
    tokenizer = train_tokenizer(
        TEXTS,
        special_tokens=tokens,
        chat_template=template,
        eos_token="<end_of_turn>",
        pad_token="<pad>",
        bos_token="<bos>",
        extra_special_tokens=images,
    )
    config = Gemma3Config(
        text_config={
            **DECODER,
            "vocab_size": len(tokenizer),
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
        vision_config={**TOWER, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        **_ids(tokenizer, boi_token_index="<start_of_image>", eoi_token_index="<end_of_image>"),
        **_ids(tokenizer, image_token_index="<image_soft_token>"),
    )
    image_processor = Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, **PIXELS)
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    _save(folder, Gemma3ForConditionalGeneration, config, tokenizer, image_processor, processor)


BUILDERS = {
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen3_vl": build_qwen3_vl,
    "smolvlm": build_smolvlm,
    "qwen3_5": build_qwen3_5,
    "idefics3": build_idefics3,
    "llava_onevision": build_llava_onevision,
    "internvl": build_internvl,
    "gemma3": build_gemma3,
}
FULLY_TESTED = ("qwen2_5_vl", "qwen3_vl", "smolvlm")
CHAT_TEMPLATES = {"llava_onevision": LLAVA_TEMPLATE}  # of the backbones whose own is none that is known


def build_backbone(name, folder):
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    BUILDERS[name](folder)
    return folder
