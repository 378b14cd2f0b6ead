"""From measurements to a table, a plot and fits."""

import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from .measure import ratio


plt.switch_backend("Agg")

BEGIN, END = "<!-- measured by make bench -->", "<!-- end of what was measured -->"
CENTRE = {"spans": 4, "latents": 8, "batch": 1, "tokens": 607}
FACTORS = {"spans": "spans S", "latents": "latents a span K", "batch": "batch", "tokens": "tokens T"}
CLOCKS = {"seconds": "wall", "cpu_seconds": "CPU"}


def progress(row):
    times = {name: statistics.median(t["seconds"]) for name, t in row["times"].items()}
    work = " ".join(f"{name} {row[name]}" for name in FACTORS)
    print(f"stage {row['stage']}, {work}:", ", ".join(f"{n} {t:.2f} s" for n, t in times.items()), flush=True)


def over(row, side: str, other: str, clock: str = "seconds") -> float | None:
    """Time of `side` over that of `other`, for as many samples; the published algorithm takes them one by one."""
    times = row["times"]
    return ratio(times[side][clock], times[other][clock]) if other in times and side in times else None


def varied(rows, stage: int, factor: str) -> list[dict]:
    """The rows of a stage in which nothing but `factor` differs from the centre."""
    fixed = {name: value for name, value in CENTRE.items() if name != factor}
    found = [row for row in rows if row["stage"] == stage and all(row[name] == v for name, v in fixed.items())]
    return sorted(found, key=lambda row: row[factor])


def bars(results) -> list[tuple[str, str, float, float, bool]]:
    """(what, asked, wall, CPU, whether the wall time meets it)"""
    stage1, stage2 = (varied(results["rows"], stage, "spans") for stage in (1, 2))
    stage1, stage2 = (next(r for r in rows if r["spans"] == CENTRE["spans"]) for rows in (stage1, stage2))
    generation = results["generation"]
    table = []

    def bar(what, sign, asked, measure):
        wall, cpu = (measure(clock) for clock in CLOCKS)
        table.append((what, f"{sign} {asked}", wall, cpu, wall >= asked if sign == "at least" else wall <= asked))

    bar("stage 1: published over ours", "at least", 4, lambda c: over(stage1, "reference", "ours", c))
    bar("stage 1: ours over its floor", "at most", 1.10, lambda c: over(stage1, "ours", "floor", c))
    bar("stage 2: published over ours", "at least", 16, lambda c: over(stage2, "reference", "ours", c))
    bar("stage 2: ours over its floor", "at most", 1.35, lambda c: over(stage2, "ours", "floor", c))
    memory = stage2["memory"]["ours"] / stage2["memory"]["floor"]
    bar("stage 2: peak memory over its floor's", "at most", 1.3, lambda c: memory)

    def step(clock):
        one = generation[1]
        return ratio(one["ours"][f"{clock}_a_step"], one["backbone"][f"{clock}_a_step"])

    bar("generation: a step over the backbone's", "at most", 1.03, step)
    samples = lambda c: 8 * ratio(generation[1]["ours"][c], generation[8]["ours"][c])  # noqa: E731
    bar("generation: samples a second, batch 8 over batch 1", "at least", 4, samples)
    text = results["text"]
    bar(
        "words alone: forward over the backbone's",
        "at most",
        1.01,
        lambda c: ratio(text["ours"][c], text["backbone"][c]),
    )
    outside = [1 - sum(run["steps"]) / run["seconds"] for run in results["runs"].values()]
    bar("training run: share outside the steps", "at most", 0.05, lambda c: max(outside))
    return table


def fit(xs, ys) -> tuple[float, float, float]:
    """Fixed part, growth for each unit of x, and the largest error relative to the measured value."""
    slope, fixed = np.polyfit(xs, ys, 1)
    errors = np.abs(fixed + slope * np.array(xs) - ys) / np.array(ys)
    return float(fixed), float(slope), float(errors.max())


def tables(results) -> str:
    rows, machine = results["rows"], results["machine"]
    lines = [
        BEGIN,
        f"`{machine['command']}`, commit {machine['commit']}, {machine['date']}, {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, fp32, {machine['minutes']:.0f} minutes, "
        f"load {machine['load']:.1f}.",
        "",
        "| bar | asked | measured (wall) | (CPU time) | met |",
        "|---|---|---|---|---|",
    ]
    for what, asked, wall, cpu, met in bars(results):
        lines.append(f"| {what} | {asked} | {wall:.3g} | {cpu:.3g} | {'yes' if met else '**no**'} |")
    lines += [
        "",
        "| stage | S | K | batch | T | ours, s | floor, s | published, s | ours / floor | published / ours | "
        "memory, MB | / floor's |",
        "|" + "---|" * 12,
    ]
    for row in sorted(rows, key=lambda r: r["stage"]):
        seconds = {n: f"{statistics.median(t['seconds']):.2f}" for n, t in row["times"].items()}
        gain = over(row, "reference", "ours")
        lines.append(
            f"| {row['stage']} | {row['spans']} | {row['latents']} | {row['batch']} | {row['tokens']} | "
            f"{seconds['ours']} | {seconds['floor']} | {seconds.get('reference', '')} | "
            f"{over(row, 'ours', 'floor'):.2f} | {'' if gain is None else f'{gain:.1f}'} | "
            f"{row['memory']['ours'] / 1e6:.0f} | {row['memory']['ours'] / row['memory']['floor']:.2f} |"
        )
    lines += ["", "| also | value |", "|---|---|"]
    for stage, run in results["runs"].items():
        first, rest = run["steps"][0], statistics.median(run["steps"][1:])
        lines.append(
            f"| stage {stage}: first step of a run, and the median of the others | {first:.2f} s, {rest:.2f} s |"
        )
    lines += [f"| `{name}` | {seconds:.1f} s |" for name, seconds in results["imports"].items()]
    for stage in (1, 2):
        compared = [row["times"] for row in rows if row["stage"] == stage and "reference" in row["times"]]
        gaps = [abs(times["ours"]["values"][0] / times["reference"]["values"][0] - 1) for times in compared]
        lines.append(
            f"| stage {stage}: largest relative difference of the losses, ours and published | {max(gaps):.0e} |"
        )
    ceilings = results["ceilings"]
    lines.append(
        f"| matrix product, matrix-vector product | {ceilings['flops'] / 1e9:.0f} GFLOP/s, "
        f"{ceilings['bytes'] / 1e9:.0f} GB/s |"
    )
    lines += ["", "| a step of ours against | fixed | for each | largest error |", "|---|---|---|---|"]
    for stage in (1, 2):
        for factor, name in FACTORS.items():
            points = varied(rows, stage, factor)
            if len(points) > 2:
                xs, ys = (
                    [p[factor] for p in points],
                    [statistics.median(p["times"]["ours"]["seconds"]) for p in points],
                )
                fixed, slope, error = fit(xs, ys)
                lines.append(f"| stage {stage}: {name} | {fixed:.2f} s | {slope * 1e3:.3g} ms | {error:.0%} |")
                fixed, slope, error = fit(xs, [p["memory"]["ours"] / 1e6 for p in points])
                lines.append(f"| stage {stage}, memory: {name} | {fixed:.0f} MB | {slope:.3g} MB | {error:.0%} |")
    return "\n".join([*lines, "", "![measured](performance.png)", "", END])


def plot(rows, path: Path):
    figure, axes = plt.subplots(3, 4, figsize=(15, 9), sharex="col", layout="constrained")
    for column, (factor, name) in enumerate(FACTORS.items()):
        for stage in (1, 2):
            points = varied(rows, stage, factor)
            xs, style = [p[factor] for p in points], {"marker": "o", "label": f"stage {stage}"}
            gains = [(p[factor], over(p, "reference", "ours")) for p in points if "reference" in p["times"]]
            axes[0, column].plot(*zip(*gains), **style)
            axes[1, column].plot(xs, [over(p, "ours", "floor") for p in points], **style)
            axes[2, column].plot(xs, [statistics.median(p["times"]["ours"]["seconds"]) for p in points], **style)
            memory = [p["memory"]["ours"] / p["memory"]["floor"] for p in points]
            axes[1, column].plot(xs, memory, ls=":", marker="s", c=f"C{stage - 1}", label=f"stage {stage}, memory")
        axes[0, column].set_yscale("log")
        axes[2, column].set_xlabel(name)
    for axis, title in zip(axes[:, 0], ("published / ours", "ours / floor", "seconds a step")):
        axis.set_ylabel(title)
        axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def save(results: dict, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "performance.json").write_text(json.dumps(results) + "\n")


def write(results: dict, folder: Path):
    """Replaces the measured part of performance.md, and the data and the plot beside it."""
    save(results, folder)
    page = folder / "performance.md"
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[-1]
    measured = tables(results)
    page.write_text(before + measured + after)
    plot(results["rows"], folder / "performance.png")
    print(measured)
