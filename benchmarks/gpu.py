"""Measures training steps and generation in bf16 on one GPU, at sizes of published models; docs/gpu.md has the result.

    python -m benchmarks.gpu --output docs    # gpu.json and the tables of gpu.md, about 2 minutes on an H100

Weights are random, see `sizes`. Times are wall times between synchronisations, medians of rounds in which the sides
alternate.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from . import measure
from .model import Workload
from .run import machine
from .sides import generation_sides, stage_sides
from .sizes import build, config_of


SIZES = ("qwen2_5_vl_3b", "qwen2_5_vl_0.5b")
STEPS = [(1, Workload()), (2, Workload()), (1, Workload(batch=8)), (2, Workload(batch=8))]
GENERATED = 33  # tokens, with a span among them
BATCHES = (1, 8, 64)
START, END = "<!-- measured by benchmarks.gpu -->\n", "<!-- end of what was measured -->"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    measure.prepare(options.threads)
    results = {"machine": machine(options, command="python -m benchmarks.gpu"), "ceilings": ceilings(), "sizes": {}}
    for name in options.sizes:
        found = results["sizes"][name] = {"steps": [], "generation": {}}
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), name)
            found |= {"parameters": parameters(name)}
            for stage, work in STEPS:
                found["steps"].append(steps(Path(folder), stage, work, options.rounds))
                print(name, json.dumps(found["steps"][-1]), flush=True)
                save(results, options.output)
            for batch in BATCHES:
                found["generation"][batch] = generation(Path(folder), batch)
                print(name, batch, json.dumps(found["generation"][batch]), flush=True)
                save(results, options.output)
    write(results, options.output / "gpu.md")


def parameters(name: str) -> dict[str, int]:
    """Parameters of the decoder's layers and of the whole model."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config_of(name)))
    layers = model.model.language_model.layers
    return {"decoder": sum(p.numel() for p in layers.parameters()), "all": sum(p.numel() for p in model.parameters())}


def ceilings() -> dict[str, float]:
    """What the card does at best: FLOP/s of a large bf16 product, bytes/s read and written by a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    times = measure.alternate({"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, rounds=10, warmup=3)
    best = {name: statistics.median(t["seconds"]) for name, t in times.items()}
    return {"flops": 2 * 8192**3 / best["product"], "bytes": 2 * source.nbytes / best["copy"]}


def steps(folder: Path, stage: int, work: Workload, rounds: int) -> dict:
    """Seconds and peak memory of the sides of one training step."""
    torch.cuda.empty_cache()
    sides = stage_sides(folder, work, stage)
    memory = {name: measure.peak_memory(run) for name, run in sides.items()}  # which warms up
    times = measure.alternate(sides, rounds=rounds, warmup=0)
    seconds = {name: statistics.median(t["seconds"]) for name, t in times.items()}
    return {"stage": stage, **vars(work), "seconds": seconds, "memory": memory}


def generation(folder: Path, batch: int) -> dict[str, float]:
    """Generated tokens a second, the prompt's time taken off, and seconds of the prompt."""
    torch.cuda.empty_cache()
    sides = generation_sides(folder, Workload(batch=batch), GENERATED)
    times = {n: statistics.median(t["seconds"]) for n, t in measure.alternate(sides, rounds=2).items()}
    found = {"prompt": times["ours, 1 step"]}
    for name in ("ours", "static", "parallel", "backbone"):
        prompt = times["backbone, 1 step" if name == "backbone" else "ours, 1 step"]
        found[name] = batch * (GENERATED - 1) / (times[name] - prompt)
    return found


def save(results: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")


def tables(results: dict) -> str:
    """The tables in Markdown."""
    about, best = results["machine"], results["ceilings"]
    lines = [
        f"`{about['command']}`, commit {about['commit']}, {about['date']}, {about['device']}, torch {about['torch']}, "
        f"bf16, SDPA; S = 4, K = 8, 607 tokens. The card's own rates, measured beside: "
        f"{best['flops'] / 1e12:.0f} TFLOP/s, {best['bytes'] / 1e12:.2f} TB/s.",
        "",
        "| size | stage | batch | ours, ms | floor, ms | ours / floor | published / ours | cached or parallel, ms "
        "| share of the matrix rate | peak memory, ours / floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results["sizes"].items():
        for row in found["steps"]:
            seconds, memory = row["seconds"], row["memory"]
            other = seconds.get("cached", seconds.get("parallel"))
            # Forward and backward of the student, and the teacher's forward in stage 1; towers left out.
            passes = 8 if row["stage"] == 1 else 6
            flops = passes * found["parameters"]["decoder"] * row["batch"] * row["tokens"]
            published = f"{seconds['reference'] / seconds['ours']:.1f}" if "reference" in seconds else "–"
            lines.append(
                f"| {name} | {row['stage']} | {row['batch']} | {1000 * seconds['ours']:.0f} "
                f"| {1000 * seconds['floor']:.0f} | {seconds['ours'] / seconds['floor']:.2f} | {published} "
                f"| {f'{1000 * other:.0f}' if other else '–'} | {flops / seconds['ours'] / best['flops']:.0%} "
                f"| {memory['ours'] / memory['floor']:.2f} |"
            )
    if not any(found["generation"] for found in results["sizes"].values()):
        return "\n".join(lines)
    lines += [
        "",
        "| size | batch | prompt, ms | tokens/s | static cache | latents of a span at once | backbone alone "
        "| ms a step | of which reading the weights takes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results["sizes"].items():
        for batch, row in found["generation"].items():
            step = int(batch) / row["ours"]
            reading = 2 * found["parameters"]["decoder"] / best["bytes"]
            lines.append(
                f"| {name} | {batch} | {1000 * row['prompt']:.0f} | {row['ours']:.0f} | {row['static']:.0f} "
                f"| {row['parallel']:.0f} | {row['backbone']:.0f} | {1000 * step:.1f} | {1000 * reading:.1f} |"
            )
    return "\n".join(lines)


def write(results: dict, page: Path) -> None:
    """Puts the tables between the marks of a page, where it has them."""
    text = page.read_text() if page.exists() else START + END
    before, rest = text.split(START)
    page.write_text(before + START + tables(results) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
