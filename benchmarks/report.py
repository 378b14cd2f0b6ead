"""From measurements to a page: what a user gains, a plot, and what is aimed at.

python -m benchmarks.report    # writes the page again from docs/performance.json
"""

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from .measure import ratio


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
    if "grpo" in results:
        bar("GRPO: a rollout over TRL's on the backbone", "at most", 1.1, over_trl(results, "rollout"))
    return table


def over_trl(results, part: str) -> float:
    """Time of a `rollout` or `step` of GRPO over that of TRL's own trainer on the backbone."""
    ours, trl = (results["grpo"][f"{side}, {part}"]["seconds"] for side in ("ours", "trl"))
    return ratio(ours, trl)


def outside_share(run) -> float:
    return 1 - sum(run["steps"]) / run["seconds"]


def gains(results) -> list[tuple[str, str]]:
    """What a user gains, in words and a number."""
    stage1, stage2 = (
        next(r for r in varied(results["rows"], stage, "spans") if r["spans"] == CENTRE["spans"]) for stage in (1, 2)
    )
    one, two = (over(stage1, "reference", side) for side in ("ours", "cached"))
    walk, parallel = (over(stage2, "reference", side) for side in ("ours", "parallel"))
    generation = results["generation"][1]
    step = ratio(generation["ours"]["seconds_a_step"], generation["backbone"]["seconds_a_step"])
    return [
        ("a step of stage 1 beside the published one", f"{one:.1f} times as fast, {two:.1f} with `cache_images`"),
        ("a step of stage 2 beside the published one", f"{walk:.0f} times as fast, {parallel:.0f} in parallel"),
        ("a token of `generate` beside the plain backbone's", f"{step:.2f} of its time"),
    ]


def tables(results) -> str:
    machine = results["machine"]
    lines = [BEGIN, "| what you gain | |", "|---|---|"]
    lines += [f"| {what} | **{gain}** |" for what, gain in gains(results)]
    lines += [
        "",
        f"`{machine['command']}`, commit {machine['commit']}, {machine['date']}, {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, fp32, {machine['minutes']:.0f} minutes, "
        f"load {machine['load']:.1f}; S = {CENTRE['spans']}, K = {CENTRE['latents']}, batch {CENTRE['batch']}, "
        f"{CENTRE['tokens']} tokens. All points of the grid are in [performance.json](performance.json).",
        "",
        "![Left: how many times as fast as the published step, over the number of spans. Right: time of a step over "
        "its floor, over the batch.](performance.png)",
        "",
        "| what we aim at | aim | measured | reached |",
        "|---|---|---|---|",
    ]
    for what, asked, measured, met in bars(results):
        lines.append(f"| {what} | {asked} | {measured:.3g} | {'yes' if met else '**no**'} |")
    if "grpo" in results:
        lines += [
            "",
            f"A step of GRPO, whose latents are walked again, takes {over_trl(results, 'step'):.2f} of TRL's.",
        ]
    if "evaluation" in results:
        seconds = {name: side["seconds"] for name, side in results["evaluation"].items()}
        over_generate, passes = (
            ratio(seconds[a], seconds[b]) for a, b in (("evaluate", "generate"), ("controls", "evaluate"))
        )
        rate = 4 / statistics.median(seconds["evaluate"])
        lines += [
            "",
            f"`ilvr evaluate` answers {rate:.2f} questions a second in batches of four, in {over_generate:.2f} of "
            f"the time of `generate` alone; with the four controls of a training run it takes {passes:.1f} times "
            "as long.",
        ]
    if "inputs" in results:
        lines += [
            "",
            "| from conversations to batches, one thread, three photos of 1024 pixels a sample | |",
            "|---|---|",
        ]
        lines += [f"| {what} | {value} |" for what, value in results["inputs"].items()]
    return "\n".join([*lines, "", END])


CURVES = ((1, "ours", "stage 1"), (2, "ours", "stage 2"), (2, "parallel", "stage 2 in parallel"))


def plot(rows, path: Path):
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    gained, beside_floor = figure.subplots(1, 2)
    for stage, side, label in CURVES:
        points = [p for p in varied(rows, stage, "spans") if "reference" in p["times"]]
        gained.plot([p["spans"] for p in points], [over(p, "reference", side) for p in points], "o-", label=label)
        points = varied(rows, stage, "batch")
        beside_floor.plot([p["batch"] for p in points], [over(p, side, "floor") for p in points], "o-", label=label)
    gained.set(yscale="log", xlabel="spans S", ylabel="times as fast as the published step")
    gained.set_yticks([1, 2, 5, 10, 20, 50], minor=False)
    gained.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    gained.yaxis.set_minor_formatter(NullFormatter())
    beside_floor.set_xticks([point["batch"] for point in varied(rows, 1, "batch")])
    beside_floor.axhline(1, color="grey", linewidth=0.8)
    beside_floor.set(xlabel="batch", ylabel="time over the floor's", ylim=(0, None))
    gained.legend(fontsize="small")
    figure.savefig(path, dpi=110)


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


if __name__ == "__main__":
    measured = json.loads(Path("docs/performance.json").read_text())
    measured["generation"] = {int(batch): times for batch, times in measured["generation"].items()}
    write(measured, Path("docs"))
