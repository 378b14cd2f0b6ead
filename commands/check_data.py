"""`ilvr check-data FILE`: the door to [`ilvr.data.check_dataset`]."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig, AutoProcessor
from trl import TrlParser

from ilvr import ILVRProcessor
from ilvr.data import check_dataset


@dataclass
class CheckDataArguments:
    """Options of `ilvr check-data`.

    Args:
        format (`str`, *optional*): format of the rows.
        image_root (`str`, *optional*): folder of the images.
        split (`str`, *optional*, defaults to `"train"`): of a folder or Hub id.
        name (`str`, *optional*): configuration of a Hub id.
        processor (`str`, *optional*): checkpoint or backbone whose processor counts tokens.
        max_length (`int`, *optional*): longest sample allowed, in tokens.
        decode_images (`bool`, *optional*, defaults to `False`): decode each image.
        output (`str`, *optional*): JSON file for the report.
    """

    format: str | None = field(
        default=None,
        metadata={"help": "native, reference, mirage, zebra_cot or monet; by default recognised from the fields"},
    )
    image_root: str | None = field(
        default=None, metadata={"help": "folder that holds all images; by default that of the data"}
    )
    split: str = field(default="train", metadata={"help": "split of a folder or Hub id"})
    name: str | None = field(default=None, metadata={"help": "configuration of a Hub id"})
    processor: str | None = field(
        default=None,
        metadata={
            "help": "checkpoint or backbone (Hub id or folder) to count tokens with",
        },
    )
    max_length: int | None = field(default=None, metadata={"help": "longest sample allowed, in tokens"})
    decode_images: bool = field(default=False, metadata={"help": "decode each image, and not only its header"})
    output: str | None = field(default=None, metadata={"help": "write the report to this JSON file"})


def main(arguments: list[str]) -> int:
    """Prints the report; returns 1 if a sample is bad or there are none, 2 if the data cannot be read, else 0."""
    parser = TrlParser(CheckDataArguments, prog="ilvr check-data", description="Checks a data set; loads no model.")
    parser.add_argument("path", help=".jsonl or .json file, folder or Hub id")
    # Without `return_remaining_strings`, TRL raises a traceback for an option that it does not know.
    options, positional, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if unknown:
        print(f"ilvr check-data: unknown arguments: {' '.join(map(str, unknown))}. --help lists all.", file=sys.stderr)
        return 2
    path, output = positional.path, options.output and Path(options.output)
    if output and not output.parent.is_dir():
        print(f"ilvr check-data: --output: there is no folder {output.parent}. Create it.", file=sys.stderr)
        return 2
    sources = {} if Path(path).is_file() else {"split": options.split, "name": options.name}
    try:
        report = check_dataset(
            path,
            format=options.format,
            image_root=options.image_root,
            processor=options.processor and load_processor(options.processor),
            max_length=options.max_length,
            decode_images=options.decode_images,
            **sources,
        )
    except (ValueError, OSError) as error:
        print(f"ilvr check-data: {error}", file=sys.stderr)
        return 2
    print(report)
    if output:
        output.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return 0 if report.is_good else 1


def load_processor(name: str) -> ILVRProcessor:
    """The processor of an ILVR checkpoint, or the one that training from a plain backbone starts with."""
    if AutoConfig.from_pretrained(name).model_type == "ilvr":
        return AutoProcessor.from_pretrained(name)
    return ILVRProcessor.from_backbone(name)
