"""`ilvr card MODEL_DIR`: writes the model card again from what is saved beside the weights."""

from argparse import Namespace

from ilvr.hub_cards import ILVRModelCard


def run(options: Namespace) -> int:
    """Writes the card, with what the options set in place of what is saved."""
    card = ILVRModelCard.load(options.model_dir)
    for name in ("repo_id", "base_model", "license", "dataset"):
        if getattr(options, name) is not None:
            setattr(card, name, getattr(options, name))
    card.save(options.model_dir)
    print(f"{options.model_dir}/README.md: {len(card.results or [])} results, {len(card.controls or [])} controls")
    return 0
