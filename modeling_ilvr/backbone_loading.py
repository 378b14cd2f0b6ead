"""What happens to a plain vision-language checkpoint before it becomes the backbone of an ILVR model."""

import os

import torch


def check_weights(name_or_path: str, report: dict):
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


def without_local_path(config):
    """A config without the folder that it was loaded from, which `save_pretrained` would publish."""
    if os.path.isdir(config._name_or_path):
        config._name_or_path = ""
    return config


@torch.no_grad()
def add_token_rows(vlm, token_ids: list[int]):
    """Gives the latent tokens embedding rows, appended or, as in Qwen's vocabularies, spare ones that exist already.

    Either way a new row starts as the mean of the others, so that it is neither likely nor unlikely at first.
    """
    num_rows = vlm.get_input_embeddings().weight.shape[0]
    if max(token_ids) >= num_rows:
        vlm.resize_token_embeddings(max(token_ids) + 1, mean_resizing=False)
    weights = {id(m.weight): m.weight for m in (vlm.get_input_embeddings(), vlm.get_output_embeddings())}
    for weight in weights.values():
        weight[token_ids] = weight[: min(token_ids)].float().mean(0).to(weight.dtype)
