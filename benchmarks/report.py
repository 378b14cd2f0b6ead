"""From measurements to a table, a plot and fits."""

import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import StrMethodFormatter

from .measure import ratio


plt.switch_backend("Agg")

BEGIN, END = "<!-- measured by make bench -->", "<!-- end of what was measured -->"
CENTRE = {"spans": 4, "latents": 8, "batch": 1, "tokens": 607}
FACTORS = {"spans": "spans S", "latents": "latents a span K", "batch": "batch", "tokens": "tokens T"}


def progress(row):
    times = {name: statistics.median(t["seconds"]) for name, t in row["times"].items()}
    work = " ".join(f"{name} {row[name]}" for name in FACTORS)
    print(f"stage {row['stage']}, {work}:", ", ".join(f"{n} {t:.2f} s" for n, t in times.items()), flush=True)


def over(row, side: str, other: str) -> float | None:
    """Time of `side` over that of `other`, for as many samples; the published algorithm takes them one by one."""
    times = row["times"]
    return ratio(times[side]["seconds"], times[other]["seconds"]) if other in times and side in times else None


def varied(rows, stage: int, factor: str) -> list[dict]:
    """The rows of a stage in which nothing but `factor` differs from the centre."""
    fixed = {name: value for name, value in CENTRE.items() if name != factor}
    found = [row for row in rows if row["stage"] == stage and all(row[name] == v for name, v in fixed.items())]
    return sorted(found, key=lambda row: row[factor])


def bars(results) -> list[tuple[str, str, float, bool]]:
    """(what, asked, measured, whether it is met)"""
    stage1, stage2 = (varied(results["rows"], stage, "spans") for stage in (1, 2))
    stage1, stage2 = (next(r for r in rows if r["spans"] == CENTRE["spans"]) for rows in (stage1, stage2))
    generation, text = results["generation"], results["text"]
    table = []

    def bar(what, sign, asked, measured):
        met = measured >= asked if sign == "at least" else measured <= asked
        table.append((what, f"{sign} {asked}", measured, met))

    bar("stage 1: published over ours", "at least", 4, over(stage1, "reference", "ours"))
    bar("the same with cache_images", "at least", 4, over(stage1, "reference", "cached"))
    bar("stage 1: ours over its floor", "at most", 1.10, over(stage1, "ours", "floor"))
    for name, side in (("stage 2", "ours"), ("stage 2 in parallel", "parallel")):
        bar(f"{name}: published over ours", "at least", 16, over(stage2, "reference", side))
        bar(f"{name}: ours over its floor", "at most", 1.35, over(stage2, side, "floor"))
        memory = stage2["memory"][side] / stage2["memory"]["floor"]
        bar(f"{name}: peak memory over its floor's", "at most", 1.3, memory)
    one, eight = generation[1], generation[8]
    step = ratio(one["ours"]["seconds_a_step"], one["backbone"]["seconds_a_step"])
    bar("generation: a step over the backbone's", "at most", 1.03, step)
    for name, side in (("", "ours"), (", static cache", "static")):
        samples = 8 * ratio(one["ours"]["seconds"], eight[side]["seconds"])
        bar(f"generation: samples a second, batch 8{name} over batch 1", "at least", 4, samples)
    words = ratio(text["ours"]["seconds"], text["backbone"]["seconds"])
    bar("words alone: forward over the backbone's", "at most", 1.01, words)
    outside = max(outside_share(results["runs"][f"stage {stage}"]) for stage in (1, 2))
    bar("training run with cache_images: share outside the steps", "at most", 0.05, outside)
    return table


def outside_share(run) -> float:
    return 1 - sum(run["steps"]) / run["seconds"]


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
        "| bar | asked | measured | met |",
        "|---|---|---|---|",
    ]
    for what, asked, measured, met in bars(results):
        lines.append(f"| {what} | {asked} | {measured:.3g} | {'yes' if met else '**no**'} |")
    lines += [
        "",
        "| step | S | K | batch | T | seconds | over the floor | published / this | memory, MB | over the floor's |",
        "|" + "---|" * 10,
    ]
    for row in sorted(rows, key=lambda r: r["stage"]):
        lines += table_rows(row)
    lines += ["", "| also | value |", "|---|---|"]
    for name, run in results["runs"].items():
        first, rest = run["steps"][0], statistics.median(run["steps"][1:])
        lines.append(
            f"| {name}: first step of a run, median of the others, share outside the steps | {first:.2f} s, "
            f"{rest:.2f} s, {outside_share(run):.1%} |"
        )
    parallel = {b: ratio(g["parallel"]["seconds"], g["ours"]["seconds"]) for b, g in results["generation"].items()}
    lines.append(
        "| generation, the latents of a span at once, over one after the other: batch 1, batch 8 | "
        f"{parallel[1]:.2f}, {parallel[8]:.2f} |"
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


SIDES = {"ours": "ours", "cached": "ours, images cached", "parallel": "ours, in parallel", "floor": "floor"}


def table_rows(row) -> list[str]:
    """A line for each of our variants, and one for the floor."""
    work = " | ".join(str(row[name]) for name in FACTORS)
    lines = []
    for side, name in SIDES.items():
        if side in row["times"]:
            seconds, gain = statistics.median(row["times"][side]["seconds"]), over(row, "reference", side)
            lines.append(
                f"| {row['stage']}, {name} | {work} | {seconds:.2f} | {over(row, side, 'floor'):.2f} | "
                f"{'' if gain is None else f'{gain:.1f}'} | {row['memory'][side] / 1e6:.0f} | "
                f"{row['memory'][side] / row['memory']['floor']:.2f} |"
            )
    return lines


def plot(rows, path: Path):
    figure, axes = plt.subplots(3, 4, figsize=(15, 9), sharex="col", layout="constrained")
    curves = ((1, "ours", "stage 1"), (2, "ours", "stage 2"), (2, "parallel", "stage 2 in parallel"))
    for column, (factor, name) in enumerate(FACTORS.items()):
        for color, (stage, side, label) in enumerate(curves):
            points = varied(rows, stage, factor)
            xs, style = [p[factor] for p in points], {"marker": "o", "c": f"C{color}", "label": label}
            gains = [(p[factor], over(p, "reference", side)) for p in points if "reference" in p["times"]]
            if len(gains) > 1:
                axes[0, column].plot(*zip(*gains), **style)
            axes[1, column].plot(xs, [over(p, side, "floor") for p in points], **style)
            axes[2, column].plot(xs, [statistics.median(p["times"][side]["seconds"]) for p in points], **style)
            memory = [p["memory"][side] / p["memory"]["floor"] for p in points]
            axes[1, column].plot(xs, memory, ls=":", marker="s", c=f"C{color}", label=f"{label}, memory")
        axes[0, column].set_yscale("log")
        axes[0, column].set_visible(axes[0, column].has_data())
        for ticks in ("set_major_formatter", "set_minor_formatter"):
            getattr(axes[0, column].yaxis, ticks)(StrMethodFormatter("{x:g}"))
        axes[2, column].set_xlabel(name)
    for axis, title in zip(axes[:, 0], ("published / ours", "ours / floor", "seconds a step")):
        axis.set_ylabel(title)
        axis.legend(fontsize="small")
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
