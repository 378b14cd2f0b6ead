"""`ilvr check-data FILE`: the door to [`ilvr.data.check_dataset`]."""

import json
from argparse import Namespace
from pathlib import Path

from transformers import AutoConfig, AutoProcessor

from ilvr import ILVRProcessor
from ilvr.data import check_dataset


def run(options: Namespace) -> int:
    """Prints the report; returns 1 if a sample is bad or there are none, else 0."""
    path, output = options.path, options.output and Path(options.output)
    if output and not output.parent.is_dir():
        raise ValueError(f"--output: there is no folder {output.parent}. Create it.")
    sources = {} if Path(path).is_file() else {"split": options.split, "name": options.name}
    report = check_dataset(
        path,
        format=options.format,
        image_root=options.image_root,
        processor=options.processor and load_processor(options.processor),
        max_length=options.max_length,
        decode_images=options.decode_images,
        **sources,
    )
    text = json.dumps(report.to_dict(), indent=2)
    print(text if options.json else report)
    if output:
        output.write_text(f"{text}\n", encoding="utf-8")
    return 0 if report.is_good else 1


def load_processor(name: str) -> ILVRProcessor:
    """The processor of an ILVR checkpoint, or the one that training from a plain backbone starts with."""
    if AutoConfig.from_pretrained(name).model_type == "ilvr":
        return AutoProcessor.from_pretrained(name)
    return ILVRProcessor.from_backbone(name)
