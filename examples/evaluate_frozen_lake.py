"""What the FrozenLake recipes report: accuracy on held-out maps, a reload elsewhere, a picture, model cards."""

import json
import subprocess
import sys
from pathlib import Path

from ilvr import ILVRForConditionalGeneration
from ilvr.evaluation import draw_curves, draw_latents, generate_answers, load_metric
from ilvr.hub_cards import ILVRModelCard, Result
from ilvr.tasks.frozen_lake import frozen_lake_dataset
from ilvr.tasks.frozen_lake.conversations import PROMPTS


RELOAD_CHECK = Path(__file__).parent / "generate_answers.py"


def evaluate_frozen_lake(cards: dict[str, ILVRModelCard], processor, recipe) -> dict:
    """Scores the checkpoints on the same test maps; writes results, cards, curves and pictures.

    Args:
        cards (`dict`): by phase; the folders of `stage1` and `stage2` hold models that answer step by step, the others
            answer directly.
        processor ([`ILVRProcessor`]).
        recipe: with `output_dir`, `seed` and `frozen_lake`, which names `test_maps` per size and `batch_size`.
    """
    print("\n=== evaluation ===", flush=True)
    folder, settings = Path(recipe.output_dir), recipe.frozen_lake
    sizes = settings["test_maps"]
    metric = load_metric("frozen_lake")
    tests = {
        task: frozen_lake_dataset(sizes, tasks=[task], split="test", seed=recipe.seed)
        for task in ("plan", "plan_trace")
    }
    results = {}
    for name, card in cards.items():
        model = ILVRForConditionalGeneration.from_pretrained(folder / name)
        dataset = tests["plan_trace" if name.startswith("stage") else "plan"]
        options = {"batch_size": settings["batch_size"], "max_new_tokens": 128, "desc": f"Testing {name}"}
        answers = generate_answers(model, processor, dataset, **options)
        results[name] = metric.compute(predictions=answers, references=dataset["board"])
        _add_results(card, results[name], sizes).save(folder / name)
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    table = _table(results, sizes)
    (folder / "results.md").write_text(table)
    print(f"\n{table}")

    draw_curves({name: folder / name / "trainer_state.json" for name in cards}, folder / "curves.png")
    few = tests["plan_trace"].select(_first_of_each(sizes, 2))
    draw_latents(model, processor, few, folder / "latents.png", max_new_tokens=128)
    print(f"Latents of stage 2 drawn to {folder / 'latents.png'}")
    _check_reload(model, processor, folder, tests["plan_trace"].select(_first_of_each(sizes, 16)))
    return results


def _first_of_each(maps_per_size: dict, number: int) -> list[int]:
    """Indices of the first few test maps of each size."""
    indices, start = [], 0
    for available in maps_per_size.values():
        indices += range(start, start + min(number, available))
        start += available
    return indices


def _table(results: dict, sizes) -> str:
    lines = ["| model | " + " | ".join(f"{s}x{s}" for s in sizes) + " | invalid |", "|---" * (len(sizes) + 2) + "|"]
    for name, scores in results.items():
        cells = []
        for s in sizes:
            value, low, high = (100 * scores[f"end_on_goal{k}_{s}x{s}"] for k in ("", "_low", "_high"))
            cells.append(f"{value:.1f} % ({low:.1f} – {high:.1f})")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {100 * scores['invalid']:.1f} % |")
    return "\n".join(lines) + "\n"


def _add_results(card: ILVRModelCard, scores: dict, sizes) -> ILVRModelCard:
    names = ("end_on_goal", "count", "end_on_goal_low", "end_on_goal_high")
    card.results = [
        Result(f"FrozenLake planning {s}x{s}", "end_on_goal", *(scores[f"{name}_{s}x{s}"] for name in names))
        for s in sizes
    ]
    card.example_prompt = PROMPTS["plan_trace"]
    card.example_image = "board.png"
    return card


def _check_reload(model, processor, folder: Path, dataset):
    """Answers of a fresh process, which loads the folder with `trust_remote_code=True`, equal those of this one."""
    expected = generate_answers(model, processor, dataset, batch_size=len(dataset), max_new_tokens=128, desc="Here")
    dataset.save_to_disk(folder / "reload_check")
    output = folder / "reload_check.json"
    command = [sys.executable, str(RELOAD_CHECK), str(folder / "stage2"), str(folder / "reload_check"), str(output)]
    subprocess.run(command, check=True)
    reloaded = json.loads(output.read_text())
    if reloaded != expected:
        different = sum(a != b for a, b in zip(reloaded, expected))
        raise RuntimeError(f"{different} of {len(expected)} answers of the reloaded model differ: see {output}.")
    print(f"Reloaded in a fresh process with trust_remote_code=True: the same {len(expected)} answers.")
