"""`ilvr convert`: a checkpoint of the paper's reference code as an ILVR checkpoint.

The reference code (github.com/XD111ds/ILVR, `src/main.py`) adds `<|latent_pad|>`, `<|latent_start|>` and
`<|latent_end|>`, in this order, to a Qwen2.5-VL, resizes its embeddings, and writes the ids and the latent size into
the backbone's own config.
"""

import json
import os
import pickle
from argparse import Namespace
from typing import Any

from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from ilvr import ILVRForConditionalGeneration, ILVRProcessor


REFERENCE_FIELDS = ("latent_token_id", "latent_start_id", "latent_end_id", "latent_size")


def convert_checkpoint(checkpoint: str, output_dir: str, *, dtype: str = "auto") -> ILVRForConditionalGeneration:
    """Saves a checkpoint of the reference code as an ILVR checkpoint: safetensors, processor and code.

    Token ids and latent size are kept. `pytorch_model.bin` files are read with weights-only loading, which runs no
    code that a file may hold.

    Args:
        checkpoint (`str`): folder or Hub id of the reference checkpoint (Qwen2.5-VL layout).
        output_dir (`str`): new or empty folder.
        dtype (`str`, *optional*, defaults to `"auto"`): of the saved weights; `"auto"` is that of the checkpoint.

    Returns:
        `ILVRForConditionalGeneration`: the model that was saved.

    Raises:
        ValueError: if the config lacks a latent field, a weight file is missing or holds more than tensors, the
            weights do not fit the config, the tokenizer gives other ids, or `output_dir` is not empty.

    Example:

    ```python
    >>> from ilvr_commands.convert import convert_checkpoint

    >>> convert_checkpoint("reference-checkpoint", "ilvr-7b")
    ```
    """
    if os.path.isdir(output_dir) and os.listdir(output_dir):
        raise ValueError(f"{output_dir} is not empty: give a new `output_dir`, where no old weights stay behind.")
    _check_config(checkpoint)
    _check_shards(checkpoint)
    processor = ILVRProcessor.from_backbone(checkpoint)
    try:
        model = ILVRForConditionalGeneration.from_backbone(checkpoint, dtype=dtype, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"A weight file of {checkpoint} is damaged or holds more than tensors, and is not loaded, since that "
            "could run code. Ask its authors for safetensors."
        ) from error
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if max(processor.latent_token_ids) >= rows:
        raise ValueError(
            f"{checkpoint} has latent ids {processor.latent_token_ids}, but embeddings of {rows} rows: these are not "
            "the weights that were trained with this tokenizer."
        )
    for name in REFERENCE_FIELDS:
        delattr(model.config.vlm_config, name)  # they have their place in ILVRConfig; two places can disagree
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    return model


def _check_config(checkpoint: str):
    config = AutoConfig.from_pretrained(checkpoint)
    absent = [name for name in REFERENCE_FIELDS if getattr(config, name, None) is None]
    if absent:
        raise ValueError(
            f"The config.json of {checkpoint} has no {', '.join(absent)}, which the reference code writes. Add what "
            "the checkpoint was trained with. A plain backbone needs no conversion: start from "
            "`ILVRForConditionalGeneration.from_backbone`."
        )


def _check_shards(checkpoint: str):
    """Looks for the files of a local index before gigabytes are read."""
    for index in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        path = os.path.join(checkpoint, index)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                weight_map = json.load(file)
            weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{path} does not say which file holds which weight. Copy or download it again.")
            shards = set(weight_map.values())
            absent = sorted(shards - set(os.listdir(checkpoint)))
            if absent:
                raise ValueError(
                    f"{index} names {len(shards)} weight files, of which {checkpoint} lacks {', '.join(absent)}: copy "
                    "or download them."
                )


def run(options: Namespace) -> int:
    """Converts, and prints what was saved."""
    model = convert_checkpoint(options.checkpoint, options.output_dir, dtype=options.dtype)
    config: Any = model.config
    ids = config.latent_token_ids
    print(f"{options.output_dir}: latent_size {config.latent_size}, start, pad and end ids {ids}, {model.dtype}")
    return 0
