"""Answers the questions of a data set with a checkpoint, as a user of the Hub would: without `ilvr` imported.

python evaluation/fresh_process.py CHECKPOINT DATASET OUTPUT.json MAX_NEW_TOKENS

The data set is a folder that `save_to_disk` wrote, with `messages` and `images`; each sample's first question, all its
turns and images before the first answer, is asked.
"""

import json
import sys
from typing import Any

import torch
from datasets import Image, List, load_from_disk
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging


def question_of(sample: Any) -> list[dict]:
    images, turns = iter(sample["images"]), []
    for message in sample["messages"]:
        if message["role"] == "assistant":
            break
        parts = [{**part, "image": next(images)} if part["type"] == "image" else part for part in message["content"]]
        turns.append({"role": message["role"], "content": parts})
    return turns


def main(checkpoint: str, dataset: str, output: str, max_new_tokens: str) -> None:
    logging.disable_progress_bar()
    model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    if type(model).__module__.startswith("ilvr"):
        raise RuntimeError("The installed ilvr was used, not the code of the checkpoint.")
    samples = load_from_disk(dataset).cast_column("images", List(Image()))  # decoded
    inputs = processor.apply_chat_template(
        [question_of(sample) for sample in samples],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=int(max_new_tokens))
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    with open(output, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
