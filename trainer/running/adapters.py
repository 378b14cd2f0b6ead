"""PEFT: what an adapter of a latent-reasoning model needs beside the layers that the user names."""

import copy
from typing import Any

from peft import PeftModel


def ilvr_model(model: Any) -> Any:
    """The ILVR model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def vision_modules(model: Any) -> list[str]:
    """Names, in an ILVR model with or without its head, of the parts of the backbone that are not its text decoder:
    vision tower and merger."""
    core = getattr(model, "core", None) or model.model.core
    prefix = next(name for name, module in model.named_modules() if module is core)
    decoder = core.get_decoder()
    return [f"{prefix}.{name}" for name, module in core.named_children() if module is not decoder]


def freeze_vision_tower(model: Any) -> None:
    """Freezes everything of the backbone that is not its text decoder or language-model head: tower and merger."""
    for name in vision_modules(model):
        model.get_submodule(name).requires_grad_(False)


def complete_peft_config(peft_config: Any, model: Any, *, freeze_vision: bool) -> Any:
    """A copy of a PEFT config that also trains and saves what a new latent span brings.

    Unless the config says otherwise: the embedding rows of the latent tokens (`trainable_token_indices`, also of the
    language-model head where it has weights of its own), a latent head with weights (`modules_to_save`), and, with
    `freeze_vision`, no adapter in the vision tower, whose features teacher and student share.

    Args:
        peft_config ([`~peft.PeftConfig`]).
        model ([`ILVRForConditionalGeneration`]).
    """
    peft_config = copy.deepcopy(peft_config)
    saved = list(getattr(peft_config, "modules_to_save", None) or [])
    if model.config.latent_head in ("linear", "mlp") and "latent_head" not in saved:
        peft_config.modules_to_save = saved = [*saved, "latent_head"]
    if hasattr(peft_config, "trainable_token_indices") and peft_config.trainable_token_indices is None:
        ids = model.config.latent_token_ids
        names = {module: name for name, module in model.named_modules()}
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        modules = [embeddings] if head.weight is embeddings.weight else [embeddings, head]
        wanted = [names[module] for module in modules if names[module].split(".")[-1] not in saved]
        peft_config.trainable_token_indices = {name: list(ids) for name in wanted} or None
    if freeze_vision and getattr(peft_config, "exclude_modules", "") is None:
        parts = "|".join(name.replace(".", r"\.") for name in vision_modules(model))
        peft_config.exclude_modules = rf"(.*\.)?({parts})(\..*)?"
    return peft_config


def complete_head(model: Any) -> None:
    """Lets TRL's fused head ask a head for its bias where PEFT trains rows of it, and wraps it without one."""
    head = ilvr_model(model).get_output_embeddings()
    if not hasattr(head, "bias") and head.original_module.bias is None:
        head.bias = None


def complete_reference_adapter(model: Any) -> None:
    """Copies rows of trained tokens into TRL's adapter "ref", which is to be what training starts from.

    TRL copies weights by names that go on after the adapter's; theirs end with it.
    """
    if not isinstance(model, PeftModel) or "ref" not in model.peft_config:
        return
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith(".default"):
            parameters[name.removesuffix("default") + "ref"].data.copy_(parameter.data)
