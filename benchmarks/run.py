"""Measures the grid and writes docs/performance.json, .png, the table in docs/performance.md, and docs/scaling.md.

    make bench
    python -m benchmarks.run --quick    # the centre alone, two rounds

The grid: 1, 4 and 8 spans of 8 latents in 607 tokens, and at 4 spans a batch of 4.
"""

import argparse
import platform
import subprocess
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from . import inputs, measure, report, scaling
from .model import Workload, build_backbone
from .sides import evaluation_sides, generation_sides, grpo_sides, stage_sides, text_sides, training_run


CENTRE = Workload()
GRID = [CENTRE, Workload(spans=1), Workload(spans=8), Workload(batch=4)]
GENERATED = 97  # tokens, with three spans among them
ROLLED_OUT = 94  # the same, and no span begun that there is no room for
RUN_STEPS = 6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the centre alone, two rounds")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the table and the plot")
    options = parser.parse_args()
    measure.prepare(options.threads)
    start, about = time.perf_counter(), machine(options)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build_backbone(folder)
        results = {"rows": []} | others(folder, options.quick)
        for work in GRID[: 1 if options.quick else None]:
            results["rows"] += steps(folder, work)
            report.save(results, options.output)  # what there is, if the run is cut off
    load = Path("/proc/loadavg").read_text().split()[2]  # of the last 15 minutes, the benchmark's own share included
    results["machine"] = about | {"minutes": (time.perf_counter() - start) / 60, "load": float(load)}
    report.write(results, options.output)
    (options.output / "scaling.md").write_text(scaling.page(results))


def steps(folder: Path, work: Workload):
    """Times of both stages at one point of the grid; at the centre, memory too."""
    for stage in (1, 2):
        sides = stage_sides(folder, work, stage)
        row = {"stage": stage, **vars(work)}
        # Stage 2 of the published algorithm takes a minute: one step of it, apart from the rounds of the others.
        slow = sides.pop("reference", None) if stage == 2 else None
        if work == CENTRE:
            row["memory"] = {name: measure.peak_memory(run) for name, run in sides.items() if name != "reference"}
        row["times"] = measure.alternate(sides, rounds=5 if work == CENTRE else 2, warmup=0)
        if stage == 2 and slow is not None:
            row["times"] |= measure.alternate({"reference": slow}, rounds=1, warmup=0)
        report.progress(row)
        yield row


def others(folder: Path, quick: bool) -> dict:
    """Generation, words alone, GRPO, evaluation, whole training runs, and what the machine can do."""
    one, eight = (generation_sides(folder, Workload(batch=batch), GENERATED) for batch in (1, 8))
    names = ("ours", "backbone", "ours, 1 step", "backbone, 1 step")
    alone = measure.alternate({name: one[name] for name in names}, rounds=2 if quick else 7)
    for name in ("ours", "backbone"):
        whole, prompt = alone[name]["seconds"], alone[f"{name}, 1 step"]["seconds"]
        alone[name]["seconds_a_step"] = [(a - b) / (GENERATED - 1) for a, b in zip(whole, prompt)]
    sides = {name: eight[name] for name in ("ours", "backbone", "static")}
    generation = {1: alone, 8: measure.alternate(sides, rounds=2, warmup=0)}
    num_steps = 2 if quick else RUN_STEPS
    runs = {f"stage {stage}": training_run(folder, CENTRE, stage, num_steps, cache_images=True) for stage in (1, 2)}
    text = measure.alternate(text_sides(folder, CENTRE), rounds=15)
    grpo = measure.alternate(grpo_sides(folder, Workload(batch=4), ROLLED_OUT), rounds=2, warmup=0)
    sides = evaluation_sides(folder, Workload(batch=4), GENERATED)
    controls = sides.pop("controls")  # five passes: once, apart from the rounds of the others
    asked = measure.alternate(sides, rounds=2, warmup=0)
    asked |= measure.alternate({"controls": controls}, rounds=1, warmup=0)
    measured = {"generation": generation, "text": text, "grpo": grpo, "evaluation": asked, "runs": runs}
    return {**measured, "inputs": inputs.rows(quick), "ceilings": measure.ceilings()}


def machine(options, command: str | None = None) -> dict:
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "device": device,
        "threads": options.threads,
        "command": command or ("python -m benchmarks.run --quick" if options.quick else "make bench"),
        "torch": torch.__version__,
        "commit": commit,
        "date": str(date.today()),
    }


if __name__ == "__main__":
    main()
