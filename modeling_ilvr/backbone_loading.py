"""What happens to a plain vision-language checkpoint before it becomes the backbone of an ILVR model."""

import json
import os
from typing import Any

import torch
from transformers import AddedToken, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_peft_available

from .configuration_ilvr import LATENT_TOKENS


def add_latent_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """Adds the latent tokens that a tokenizer lacks; returns the ids of start, pad and end."""
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in LATENT_TOKENS], True)
    start, pad, end = tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))
    return start, pad, end


def check_reference_ids(vlm_config: PreTrainedConfig, ids: tuple[int, int, int]) -> None:
    """A checkpoint of the paper's reference code names its ids in the backbone's config, and keeps them.

    Raises:
        ValueError: if its tokenizer gives others.
    """
    if not hasattr(vlm_config, "latent_token_id"):
        return
    trained: Any = (vlm_config.latent_start_id, vlm_config.latent_token_id, vlm_config.latent_end_id)
    if trained != ids:
        raise ValueError(
            f"The checkpoint was trained with latent ids {list(trained)}, its tokenizer gives {list(ids)}. Use the "
            "tokenizer that was saved with the checkpoint."
        )


def resolve_latent_size(vlm_config: PreTrainedConfig, latent_size: int | None) -> int:
    """K: what the caller asks for, else what a reference checkpoint was trained with, else 8.

    Raises:
        ValueError: if the two disagree.
    """
    trained = getattr(vlm_config, "latent_size", None)
    if trained is not None and latent_size not in (None, trained):
        raise ValueError(
            f"latent_size={latent_size} disagrees with the checkpoint, which was trained with {trained}. Leave "
            "latent_size out to use the checkpoint's."
        )
    return latent_size or trained or 8


def resolve_latent_head(vlm_config: PreTrainedConfig, latent_head: str | None) -> str:
    """What the caller asks for, else the paper's for a reference checkpoint, which was trained with it, else ours."""
    return latent_head or ("identity" if hasattr(vlm_config, "latent_token_id") else "rescale")


@torch.no_grad()
def mean_word_norm(vlm: PreTrainedModel, num_words: int = 4096) -> float:
    """The mean L2 norm of what the decoder is fed for some words, evenly spread over the vocabulary.

    By the layer and not its weight: Gemma's multiplies by sqrt(D).
    """
    layer: Any = vlm.get_input_embeddings()
    rows = len(layer.weight)
    ids = torch.arange(0, rows, max(rows // num_words, 1), device=layer.weight.device)
    return float(layer(ids).norm(dim=-1, dtype=torch.float32).mean())


def check_weights(name_or_path: str, report: dict[str, Any]) -> None:
    """Refuses a checkpoint that does not fill its model: transformers warns and leaves such weights random."""
    shapes = [f"{key} {tuple(saved)}, not {tuple(wanted)}" for key, saved, wanted in report["mismatched_keys"]]
    kinds = {"missing": report["missing_keys"], "unknown": report["unexpected_keys"], "of another shape": shapes}
    found = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if found:
        raise ValueError(
            f"The weights of {name_or_path} do not fit its config.json: {'; '.join(found)}. Use the config.json that "
            "was saved with the weights, and all of the weight files."
        )


def without_local_path(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config without the folder that it was loaded from, which `save_pretrained` would publish."""
    if os.path.isdir(config._name_or_path):
        config._name_or_path = ""
    return config


@torch.no_grad()
def add_token_rows(vlm: PreTrainedModel, token_ids: tuple[int, ...]) -> None:
    """Gives the latent tokens embedding rows, appended or, as in Qwen's vocabularies, spare ones that exist already.

    Either way a new row starts as the mean of the others, so that it is neither likely nor unlikely at first.
    """
    num_rows = vlm.get_input_embeddings().weight.shape[0]
    if max(token_ids) >= num_rows:
        vlm.resize_token_embeddings(max(token_ids) + 1, mean_resizing=False)
    layers: Any = (vlm.get_input_embeddings(), vlm.get_output_embeddings())
    weights = {id(layer.weight): layer.weight for layer in layers}
    for weight in weights.values():
        weight[list(token_ids)] = weight[: min(token_ids)].float().mean(0).to(weight.dtype)


def load_adapter(model_class: Any, name_or_path: str, adapter_config: str, hub: dict[str, Any], **kwargs: Any) -> Any:
    """An adapter of an ILVR model over its backbone, as a `PeftModel`.

    Args:
        model_class (`type`): `ILVRForConditionalGeneration`.
        name_or_path (`str`): Hub id or folder; it holds the ILVR config beside the adapter's.
        adapter_config (`str`): file of the adapter's config.
        hub (`dict`): `revision`, `token` and the like.
        kwargs: of `from_pretrained`; `is_trainable` is the adapter's, `backbone` says where its backbone is.

    Raises:
        ValueError: if there is no ILVR config, or the caller asks for another `latent_size`.
        ImportError: without peft.
    """
    # Within such a condition transformers does not ask those for peft who load a checkpoint without an adapter.
    if is_peft_available():
        from peft import PeftModel
    else:
        raise ImportError(f"{name_or_path} holds an adapter, which needs peft: `pip install peft`.")

    with open(adapter_config, encoding="utf-8") as file:
        base = kwargs.pop("backbone", None) or json.load(file).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{name_or_path} does not name its backbone, which was a local folder. Pass backbone=FOLDER.")
    saved, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
    if saved.get("model_type") != "ilvr":
        raise ValueError(
            f"{name_or_path} holds an adapter without the config.json of its ILVR model, which says how many "
            "latents a span has. Save it with ILVRTrainer, or load it by PEFT over `from_backbone(…, latent_size=K)`."
        )
    size = saved["latent_size"]
    if (asked := kwargs.pop("latent_size", size)) != size:
        raise ValueError(f"The adapter {name_or_path} was trained with latent_size={size}, not {asked}.")
    is_trainable = kwargs.pop("is_trainable", False)
    settings = {k: v for k, v in kwargs.items() if k not in ("trust_remote_code", *hub)}
    base_config, _ = PreTrainedConfig.get_config_dict(base)
    if base_config.get("model_type") == "ilvr":
        model = model_class.from_pretrained(base, **settings)
    else:
        sizes = {"latent_size": size, "latent_head": saved["latent_head"]}
        model = model_class.from_backbone(base, **sizes, **settings)
    model.config.latent_norm = saved.get("latent_norm", model.config.latent_norm)
    ids = tuple(saved[f"latent_{token}_token_id"] for token in ("start", "pad", "end"))
    if model.config.latent_token_ids != ids:
        raise ValueError(
            f"The adapter {name_or_path} was trained with latent ids {ids}, its base {base} gives "
            f"{model.config.latent_token_ids}. It is of another version of the base."
        )
    return PeftModel.from_pretrained(model, name_or_path, is_trainable=is_trainable, **hub)
