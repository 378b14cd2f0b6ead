"""What each way of selecting targets finds, and what it costs: the table in docs/training.md.

    python -m studies.run studies/shifts.yaml --arms base --seeds 1 2
    python -m benchmarks.selection runs/studies/shifts/2/base

Boards of shifts, of which it is known which patch is followed. Sides alternate, a batch of 8 traces at a time.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.tasks import load_task
from ilvr.trainer import ILVRTrainer, ILVRTrainingConfig

from .measure import alternate, prepare


QUESTION = "Where is the player?"
ASKED = ("attention", "answer_gradient", "answer_occlusion")
SIDES = {
    **{method: {"selection_method": method} for method in ("uniform", "query_top_p", "change")},
    **{method: {"selection_method": method, "helper_question": QUESTION} for method in ASKED},
    **{f"{method}, no question": {"selection_method": method} for method in ASKED[:2]},
}
BATCH = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a base of shifts")
    parser.add_argument("--traces", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    prepare(options.threads)
    task = load_task("shifts", boards=options.traces, test_boards=1, lengths=(4, 10), seed=options.traces)
    dataset, processor = task.dataset("train"), ILVRProcessor.from_pretrained(options.model)
    sides, shares = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in SIDES.items():
            model = ILVRForConditionalGeneration.from_pretrained(options.model, attn_implementation="eager")
            args = ILVRTrainingConfig(folder, report_to="none", bf16=False, use_cpu=True, **settings)
            trainer = ILVRTrainer(model, args, train_dataset=dataset, processing_class=processor)
            rows = [trainer.train_dataset[i] for i in range(len(dataset))]
            batches = [trainer._batch_of(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
            shares[name] = torch.cat([trainer.select_targets(batch).holds_followed() for batch in batches])
            sides[name] = lambda trainer=trainer, batch=batches[0]: trainer.select_targets(batch)
    pictures = len(batches[0].helper_inputs["image_lengths"])
    times = alternate(sides, rounds=options.rounds)
    print(f"{len(shares[name])} pictures; ms a picture, of batches of {BATCH} traces with {pictures}\n")
    print("| selection_method | holds the player's patch, % | ms a picture |\n|---|---|---|")
    for name, found in shares.items():
        cost = 1000 * statistics.median(times[name]["seconds"]) / pictures
        print(f"| {name} | {100 * found.float().mean():.1f} | {cost:.2f} |")


if __name__ == "__main__":
    main()
