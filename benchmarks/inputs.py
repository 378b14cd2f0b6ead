"""From conversations to batches: preparation, collation and waiting for data, on samples of large photos.

    python -m benchmarks.inputs [--quick]

A sample has one user image and two helper images, JPEG files of about 1024 x 768 pixels with noise, embedded in the
data. The processor is Qwen2.5-VL's with its own limits of size.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ilvr import ILVRProcessor
from ilvr.trainer import LatentDataCollator
from ilvr.trainer.inputs.data_preparation import prepare_dataset

from .model import build_backbone


STEP_SECONDS = 1.0  # of the step that the loader runs beside


def photos(number: int) -> Dataset:
    """Conversations with three photos each."""
    rng = np.random.default_rng(0)
    features = Features(
        {
            "messages": List(
                {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
            ),
            "images": List(Image()),
        }
    )
    shapes = [(768, 1024), (1024, 768), (1024, 1024)]
    files = []
    for i in range(24):
        height, width = shapes[i % 3]
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        PILImage.fromarray(coarse).resize((width, height)).save(buffer, "JPEG", quality=90)
        files.append({"bytes": buffer.getvalue(), "path": None})
    image, text = {"type": "image", "text": None}, lambda words: {"type": "text", "text": words}
    rows = []
    for i in range(number):
        turns = [
            {"role": "user", "content": [image, text(f"What happens in picture {i}? Answer step by step.")]},
            {"role": "assistant", "content": [text("First this."), image, text("Then that."), image, text("Done.")]},
        ]
        rows.append({"messages": turns, "images": [files[(3 * i + j) % 24] for j in range(3)]})
    return Dataset.from_list(rows, features=features)


def seconds(run) -> tuple[float, float]:
    """Wall and processor time of this process."""
    wall, own = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - own


def without_helpers(dataset: Dataset) -> Dataset:
    """The same with the user's image alone, which TRL's collator can take."""

    def strip(row):
        for message in row["messages"]:
            if message["role"] == "assistant":
                message["content"] = [part for part in message["content"] if part["type"] == "text"]
        return {"messages": row["messages"], "images": row["images"][:1]}

    return dataset.map(strip)


def collate(dataset, collator, batch_size: int = 4) -> float:
    """Samples a second of one process."""
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
    wall, _ = seconds(lambda: [None for _ in loader])
    return len(dataset) / wall


def waiting(dataset, collator, workers: int, batch_size: int = 4) -> float:
    """Share of the time of a run that waits for data, beside steps that leave the processor free."""
    loader = DataLoader(
        dataset, batch_size=batch_size, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0
    )
    batches = iter(loader)
    next(batches)  # workers start
    start, waited = time.perf_counter(), 0.0
    for _ in range(len(loader) - 1):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(STEP_SECONDS)
    return waited / (time.perf_counter() - start)


def rows(quick: bool) -> dict[str, str]:
    """What is measured, in words and numbers."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        build_backbone(Path(folder))
        processor = ILVRProcessor.from_backbone(folder, latent_size=8)
        processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 12845056}  # Qwen2.5-VL's own
        dataset = photos(60 if quick else 600)
        wall, own = seconds(lambda: prepare_dataset(dataset, processor, stage=1))
        prepared = prepare_dataset(dataset, processor, stage=1)
        few = prepared.select(range(8 if quick else 40))
        plain = without_helpers(dataset.select(range(len(few))))
        asked = prepare_dataset(plain, processor, stage=2)
        ours = LatentDataCollator(processor)
        trl = DataCollatorForVisionLanguageModeling(processor, max_length=None)
        found = {
            "preparation, samples a second of wall and of processor time": f"{len(dataset) / wall:.0f}, "
            f"{len(dataset) / own:.0f}",
            "collation with helper images, samples a second": f"{collate(few, ours):.1f}",
            "collation of the user's image alone, samples a second: ours, TRL's": f"{collate(asked, ours):.1f}, "
            f"{collate(plain, trl):.1f}",
        }
        shares = [f"{waiting(few, ours, workers):.0%}" for workers in (0, 1, 2)]
        steps = f"share that waits for data, 4 samples a step of {STEP_SECONDS:g} s: 0, 1, 2 workers"
        return {**found, steps: ", ".join(shares)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, value in rows(options.quick).items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
