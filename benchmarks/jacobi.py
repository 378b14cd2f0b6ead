"""What latents in parallel cost in accuracy, on the small FrozenLake model: the tables of docs/parallel_latents.md.

make train
python -m benchmarks.jacobi runs/frozen_lake_small            # error and accuracy of the trained model
python -m benchmarks.jacobi runs/frozen_lake_small --train    # also stage 2, trained with each setting
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import yaml
from torch.nn.functional import cross_entropy

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.evaluation import generate_answers, load_metric, scores_by_group
from ilvr.tasks import Task, load_task
from ilvr.trainer.inputs.data_collator import LatentBatch, LatentDataCollator
from ilvr.trainer.inputs.data_preparation import prepare_dataset
from ilvr_commands.train import Recipe, phases_of, train


RECIPE = Path(__file__).parents[1] / "examples" / "recipes" / "frozen_lake_small.yaml"
ITERATIONS = (1, 2, 3, 4, 6, 8)
SETTINGS = {
    "one after the other": {},
    "3 iterations": {"jacobi_iterations": 3},
    "3 iterations, gradient through 1": {"jacobi_iterations": 3, "jacobi_gradient_iterations": 1},
    "3 iterations, no gradient through latents": {"jacobi_iterations": 3, "jacobi_gradient_iterations": 0},
    "1 iteration": {"jacobi_iterations": 1},
}
CONTROLS = {
    "zeros": lambda latents, span, index: torch.zeros_like(latents),
    "noise of their scale": lambda latents, span, index: torch.randn_like(latents) * latents.std(),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="what make train left: folders stage1 and stage2")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="the recipe of that run")
    parser.add_argument("--train", action="store_true")
    options = parser.parse_args()
    recipe = yaml.safe_load(options.recipe.read_text())
    task = load_task(recipe["task"], seed=recipe["seed"], **recipe["task_settings"])
    tests = task.dataset("test")
    processor = ILVRProcessor.from_pretrained(options.run / "stage2")
    model = ILVRForConditionalGeneration.from_pretrained(options.run / "stage2").eval()

    groups = [task.group(sample) for sample in tests.remove_columns("images")]
    for group in dict.fromkeys(groups):
        rows = [i for i, own in enumerate(groups) if own == group][:64]
        print(f"\n{group} boards, {len(rows)} traces of the test maps\n", flush=True)
        print(forced_table(model, processor, tests.select(rows)), flush=True)
    print("\nwritten by generate\n\n| jacobi_iterations | goals | seconds |\n|---|---|---|", flush=True)
    for iterations in (None, 1, 2, 3):
        start = time.perf_counter()
        goals = score(model, processor, task, recipe, jacobi_iterations=iterations)
        print(f"| {iterations or 'none'} | {goals} | {time.perf_counter() - start:.0f} |", flush=True)
    print("\nthe controls: are the latents used?\n\n| latents | goals |\n|---|---|", flush=True)
    for name, intervention in CONTROLS.items():
        print(f"| {name} | {score(model, processor, task, recipe, latent_intervention=intervention)} |", flush=True)
    if options.train:
        print("\nstage 2, trained\n\n| setting | minutes | goals |\n|---|---|---|", flush=True)
        for name, setting in SETTINGS.items():
            print(f"| {name} | {train_stage2(options, recipe, processor, task, setting)} |", flush=True)


@torch.no_grad()
def forced_table(model, processor, dataset) -> str:
    """Error of latents, logits and predictions after n iterations, over traces that are given."""
    prepared = prepare_dataset(dataset, processor, stage=2)
    batch = LatentBatch.of(LatentDataCollator(processor, helper_images=False)([*prepared]))
    inputs, labels = batch.inputs, batch.shift_labels
    counted = labels != -100

    def cells(outputs):
        logits = outputs.logits[counted]
        accuracy = (logits.argmax(-1) == labels[counted]).float().mean()
        return f"{cross_entropy(logits, labels[counted]):.4f} | {accuracy:.2%} |"

    exact = model(**inputs, use_cache=False)
    used = exact.latent_inputs.any(-1)  # (B, S, K)
    lines = [
        "| iterations | error of the latents | of a logit, at most | cross-entropy | right words |",
        "|---" * 5 + "|",
    ]
    for iterations in ITERATIONS:
        outputs = model(**inputs, use_cache=False, jacobi_iterations=iterations)
        error = (outputs.latent_inputs - exact.latent_inputs)[used].norm() / exact.latent_inputs[used].norm()
        largest = (outputs.logits - exact.logits)[counted].abs().max()
        lines.append(f"| {iterations} | {error:.1e} | {largest:.1e} | {cells(outputs)}")
    return "\n".join([*lines, f"| one after the other, {int(used.flatten(1).sum(1).max())} | | | {cells(exact)}"])


def score(model, processor, task: Task, recipe: dict, **kwargs) -> str:
    """Share of plans that end on the goal, with Wilson intervals, for each size of board."""
    tests = task.dataset("test")
    answers = generate_answers(model, processor, tests, **recipe["evaluation"], **kwargs)
    references = [task.reference(sample) for sample in tests.remove_columns("images")]
    scores = scores_by_group(load_metric(task.metric).compute(predictions=answers, references=references))
    return ", ".join(f"{group}: {score}" for group, score in scores.items() if group)


def train_stage2(options, recipe: dict, processor, task: Task, setting: dict) -> str:
    with tempfile.TemporaryDirectory() as folder:
        variant = Recipe(**{**recipe, "output_dir": folder, "stage2": {**recipe["stage2"], **setting}})
        model = ILVRForConditionalGeneration.from_pretrained(options.run / "stage1", **variant.model_kwargs)
        start = time.perf_counter()
        train("stage2", phases_of(variant)["stage2"], task.dataset("train"), model, processor, variant)
        minutes = (time.perf_counter() - start) / 60
        trained = ILVRForConditionalGeneration.from_pretrained(f"{folder}/stage2").eval()
    return f"{minutes:.1f} | {score(trained, processor, task, recipe)}"


if __name__ == "__main__":
    main()
