"""Stage 2 as a fixed point beside the walk and the floor, on a trained model: the table of docs/parallel_latents.md.

make train
python -m benchmarks.fixed_point runs/shifts_small/stage2 --task shifts
"""

import argparse
import time
from functools import partial
from statistics import median

import torch
import yaml
from torch.nn.functional import cross_entropy

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.tasks import load_task
from ilvr.trainer.inputs.data_collator import LatentBatch, LatentDataCollator
from ilvr.trainer.inputs.data_preparation import prepare_dataset


TOLERANCES = (1e-2, 1e-3, 1e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint of stage 2")
    parser.add_argument("--task", default="shifts")
    parser.add_argument("--task_settings", type=yaml.safe_load, default={"boards": 16, "test_boards": 16})
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model = ILVRForConditionalGeneration.from_pretrained(options.model).train()
    model.requires_grad_(True)
    model.model.core.get_encoder(modality="image").requires_grad_(False)  # as in training
    processor = ILVRProcessor.from_pretrained(options.model)
    dataset = prepare_dataset(load_task(options.task, **options.task_settings).dataset("test"), processor, stage=2)
    print("| batch | tokens, latents a row | way | time over the floor | forwards | backwards | gradient's error |")
    print("|---|---|---|---|---|---|---|")
    for size in options.batch_sizes:
        batch = LatentBatch.of(LatentDataCollator(processor, helper_images=False)([dataset[i] for i in range(size)]))
        for line in compare(model, batch, options.rounds):
            print(f"| {size} | {line}", flush=True)


def compare(model, batch, rounds: int) -> list[str]:
    """Lines of the table: each way beside the floor, which computes the same tokens with latents that are given."""
    inputs, labels = batch.inputs, batch.shift_labels
    with torch.no_grad():
        values = model(**inputs, use_cache=False).latent_inputs
    ways = {"floor": {"latent_values": values}, "one after the other": {}}
    ways |= {f"fixed point, {tolerance:g}": {"fixed_point_tolerance": tolerance} for tolerance in TOLERANCES}

    def step(options):
        logits = model(**inputs, **options, use_cache=False).logits
        cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    seconds = {name: [] for name in ways}
    for _ in range(rounds):  # alternating
        for name, options in ways.items():
            start = time.perf_counter()
            step(options)
            seconds[name].append(time.perf_counter() - start)
    expected, lines = step({}), []
    latents = (inputs["input_ids"] == model.config.latent_pad_token_id).sum(1)
    shape = f"{inputs['input_ids'].shape[1]}, {latents.min()} to {latents.max()}"
    for name, options in ways.items():
        counts = count_passes(model, partial(step, options))
        ratio = median(own / floor for own, floor in zip(seconds[name], seconds["floor"]))
        error = largest_error(step(options), expected)
        lines.append(f"{shape} | {name} | {ratio:.2f} | {counts[0]} | {counts[1]} | {error:.1e} |")
    return lines


def count_passes(model, run) -> tuple[int, int]:
    """How often the last decoder layer runs, forwards and backwards."""
    calls = {"forward": 0, "backward": 0}

    def count(kind):
        calls[kind] += 1

    layer = model.model.core.get_decoder().layers[-1]

    def on_forward(module, args, output):
        count("forward")
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: count("backward"))

    handle = layer.register_forward_hook(on_forward)
    run()
    handle.remove()
    return calls["forward"], calls["backward"]


def largest_error(found, expected) -> float:
    """Over weights: the norm of the difference, relative to that of the gradient or to a thousandth of the largest."""
    floor = 1e-3 * max(gradient.norm() for gradient in expected.values())
    return max(float((found[n] - g).norm() / g.norm().clamp(min=floor)) for n, g in expected.items())


if __name__ == "__main__":
    main()
