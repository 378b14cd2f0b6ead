"""Answers the questions of a data set with a checkpoint, as a user of the Hub would: without `ilvr` installed.

python examples/generate_answers.py CHECKPOINT DATASET OUTPUT.json
"""

import json
import sys

import torch
from datasets import load_from_disk
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging


def main(checkpoint: str, dataset: str, output: str):
    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    if type(model).__module__.startswith("ilvr"):
        raise RuntimeError("The installed ilvr was used, not the code of the checkpoint.")
    conversations = []
    for sample in load_from_disk(dataset):
        question = sample["messages"][0]["content"][1]["text"]
        content = [{"type": "image", "image": sample["images"][0]}, {"type": "text", "text": question}]
        conversations.append([{"role": "user", "content": content}])
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=128)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    with open(output, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
