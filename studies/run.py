"""Trains and tests the arms of a study, one after the other; what is there already is left as it is.

    python -m studies.run studies/shifts.yaml --seeds 0 1 2
    python -m studies.run studies/shifts.yaml --seeds 0 --arms answer_only stage1
    python -m studies.run studies/shifts.yaml --seeds 0 1 2 --processes 12    # arms at once, on a GPU or many cores
    python -m studies.run studies/shifts.yaml --rehearse    # two steps an arm: does this machine have what it takes?

Checkpoints go to `runs/studies/NAME/SEED/ARM`, what was measured to `studies/results/NAME/ARM-SEED.json`, of which
`python -m studies.page` makes the tables.
"""

import argparse
import json
import multiprocessing
import subprocess
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.evaluation import Evaluator, Questions, SwapGapCallback, follow_donors, run_controls
from ilvr.tasks.small_qwen import build_small_qwen
from ilvr.trainer import ILVRGRPOConfig, ILVRGRPOTrainer, ILVRTrainer, ILVRTrainingConfig, make_prompts
from ilvr.trainer.rewards import load_rewards

from .study import Study


LOGGED = ("loss", "latent_cosine", "retrieval_at_1", "followed_share", "latent_norm_ratio", "selected_per_span")
LOGGED += ("reward", "rewards/accuracy/mean", "spans_per_sample", "samples_without_spans", "entropy")
LOGGED += ("latent_norm_drift", "completions/mean_length")
HELD_OUT = ("eval_accuracy", "eval_swapped_accuracy", "eval_emission_rate")
ROUNDS = 3  # of training, at most, of an arm that has `until_loss`
WATCHED = 128  # questions that an arm is asked while it trains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", help="by default all; with each come those that it continues")
    parser.add_argument("--processes", type=int, default=1, help="arms that are trained and tested at once")
    parser.add_argument("--rehearse", action="store_true", help="two steps and eight questions an arm; keeps nothing")
    options = parser.parse_args()
    study = Study.load(options.study)
    unknown = set(options.arms or ()) - set(study.arms)
    if unknown:
        parser.error(f"there are no arms {sorted(unknown)}; choose from {list(study.arms)}")
    with tempfile.TemporaryDirectory() as folder:
        if options.rehearse:
            study = study.rehearsal(Path(folder))
        run_all(study, options.arms or list(study.arms), options.seeds, options.processes)


def run_all(study: Study, arms: list[str], seeds: list[int], processes: int) -> None:
    """Runs arms one after the other, or in several processes."""
    if processes > 1:
        run_at_once(study, arms, seeds, processes)
        return
    for seed in seeds:
        for arm in arms:
            run(study, arm, seed)


def run_at_once(study: Study, arms: list[str], seeds: list[int], processes: int) -> None:
    """Runs arms in several processes, each as soon as the one that it continues is done, in the order given.

    An arm that fails takes those with it that continue it; the others are run.

    Raises:
        RuntimeError: at the end, names the arms that failed.
    """
    waiting = [(name, seed) for name in study.with_those_before(arms) for seed in seeds]
    running: dict[Future, tuple[str, int]] = {}
    done: set[tuple[str | None, int]] = set()
    failed: dict[tuple[str, int], BaseException] = {}
    # A fork is there at once, but a process forked from one that has looked for a GPU cannot use it.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while waiting or running:
            ready = [(arm, seed) for arm, seed in waiting if (study.arms[arm].after, seed) in {*done, (None, seed)}]
            for arm, seed in ready[: processes - len(running)]:
                waiting.remove((arm, seed))
                running[pool.submit(run, study, arm, seed)] = arm, seed
            if not running:
                break  # what waits continues an arm that failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                if error is None:
                    done.add(job)
                else:
                    failed[job] = error
                    print(f"{job[0]}, seed {job[1]}, failed: {error!r}", flush=True)
    if failed:
        raise RuntimeError(f"Failed: {sorted(failed)}; not run: {sorted(waiting)}.") from next(iter(failed.values()))


def run(study: Study, name: str, seed: int) -> Path:
    """Trains and tests an arm, unless it was; returns the folder of its checkpoint."""
    folder = study.runs / study.name / str(seed) / name
    result = study.results / study.name / f"{name}-{seed}.json"
    if result.exists() and not study.is_of(json.loads(result.read_text())):
        raise ValueError(
            f"{result} is of another definition of {name} than {study.name} has now. Remove it, and {folder}."
        )
    if not (folder / "trainer_state.json").exists():  # saved last
        train(study, name, seed, folder)
    if not result.exists():
        found = measure(study, name, seed, folder)
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}, seed {seed}: {accuracies(found)}", flush=True)
    return folder


def train(study: Study, name: str, seed: int, folder: Path) -> None:
    """Trains an arm and saves its checkpoint."""
    arm, task = study.arms[name], study.task_of(seed, arm=name)
    if arm.after is None:
        source = folder / "backbone"
        torch.manual_seed(seed)
        build_small_qwen(source, study.task_of(seed).texts(), **{**study.backbone, **arm.backbone})
        model = ILVRForConditionalGeneration.from_backbone(source, **arm.model)
        # The patch projection stays random: boards need no better one, and its gradient is dear on a CPU.
        model.vlm.model.visual.patch_embed.requires_grad_(False)
        processor = ILVRProcessor.from_backbone(source, latent_size=model.config.latent_size)
    else:
        source = run(study, arm.after, seed)
        model = ILVRForConditionalGeneration.from_pretrained(source, **arm.model)
        processor = ILVRProcessor.from_pretrained(source)
        if model.config.latent_size != processor.latent_size:  # the chat template says how many latents a span has
            processor = ILVRProcessor.from_backbone(source / "backbone", latent_size=model.config.latent_size)
    print(f"\n=== {name}, seed {seed} ===", flush=True)
    data, settings = task.dataset("train", arm.form), study.settings_of(name, seed)
    if study.training_samples is not None:
        data = data.select(range(min(study.training_samples, len(data))))
    trainer: ILVRTrainer | ILVRGRPOTrainer
    if arm.rewards:
        rewards = load_rewards(arm.rewards, metric=task.metric, processor=processor)
        prompts = make_prompts(data, task.reference)
        config = ILVRGRPOConfig(str(folder), **settings)
        trainer = ILVRGRPOTrainer(model, rewards, config, train_dataset=prompts, processing_class=processor)
    else:
        config = ILVRTrainingConfig(str(folder), **settings)
        trainer = ILVRTrainer(model, config, train_dataset=data, processing_class=processor)
    if arm.watched:
        few = min(WATCHED, study.controlled)
        questions = Questions.of_task(task, form=arm.form, samples=few)
        options = {"batch_size": study.batch_size, "max_new_tokens": study.max_new_tokens}
        trainer.add_callback(SwapGapCallback(trainer, questions, num_samples=few, every=arm.watched, **options))
    start = time.perf_counter()
    for _ in range(ROUNDS):
        trainer.optimizer = None  # each round has a new one, as it has a new schedule
        trainer.train()
        if arm.until_loss is None or last_loss(trainer) <= arm.until_loss:
            break
    else:
        raise ValueError(f"{name}, seed {seed}: the loss is {last_loss(trainer):.3f}, and should be {arm.until_loss}.")
    trainer.save_model()
    (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - start))
    (folder / "commit.json").write_text(json.dumps(commit()))
    trainer.save_state()


def last_loss(trainer: ILVRTrainer | ILVRGRPOTrainer) -> float:
    """The mean over the last steps that were logged."""
    return next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)


def measure(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """What an arm's checkpoint answers in each test, with its own latents and under its controls."""
    arm = study.arms[name]
    model = ILVRForConditionalGeneration.from_pretrained(folder).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = ILVRProcessor.from_pretrained(folder)
    settings = {"batch_size": study.batch_size, "max_new_tokens": study.max_new_tokens}
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found: dict[str, Any] = {
        "arm": name,
        "seed": seed,
        "commit": json.loads((folder / "commit.json").read_text()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "definition": study.definition_of(name, seed),
        "seconds": round(json.loads((folder / "seconds.json").read_text())),
        "log": [{k: round(e[k], 5) for k in ("step", *LOGGED) if k in e} for e in log if "loss" in e],
        "tests": {},
    }
    if arm.watched:
        found["held_out"] = [{k: e[k] for k in ("step", *HELD_OUT)} for e in log if HELD_OUT[0] in e]
    form = "answer" if arm.form == "base" else arm.form
    for test, own in study.tests.items():
        task = study.task_of(seed, test)
        questions = Questions.of_task(task, form=form, samples=own["samples"])
        result = run_questions(model, processor, questions, settings)
        result |= {"groups": [task.group(sample) for sample in questions.samples]}
        if arm.controls:
            few = Questions.of_task(task, form=form, samples=min(own["samples"], study.controlled))
            result["controls"] = controlled(model, processor, few, arm.controls, settings)
        found["tests"][test] = result
    return found


def run_questions(
    model: ILVRForConditionalGeneration, processor: ILVRProcessor, questions: Questions, settings: dict[str, Any]
) -> dict[str, Any]:
    """Answers as they come: which are right, as a text of 0 and 1, and the spans of each; means of spans, tokens."""
    records = Evaluator(model, processor, questions, **settings).run().records
    return {
        "right": bits(record.right for record in records),
        "spans_of_each": " ".join(str(record.spans) for record in records),
        "spans": round(sum(record.spans for record in records) / len(records), 3),
        "tokens": round(sum(record.tokens for record in records) / len(records), 3),
    }


def controlled(
    model: ILVRForConditionalGeneration,
    processor: ILVRProcessor,
    questions: Questions,
    names: list[str],
    settings: dict[str, Any],
) -> dict[str, str]:
    """Which answers are right with other latents; `donor`: which are the donor's, with the donor's last span."""
    evaluator = Evaluator(model, processor, questions, **settings)
    runs = run_controls(evaluator, [name for name in names if name != "donor"])
    found = {name: bits(own.right) for name, own in runs.items()}
    followed = follow_donors(evaluator, runs["own"]) if "donor" in names else None
    if followed is not None:
        found["donor"] = bits(followed.follows.values())
    return found


def bits(values: Any) -> str:
    return "".join("01"[bool(value)] for value in values)


def accuracies(found: dict[str, Any]) -> str:
    def rate(right: str) -> str:
        return f"{100 * right.count('1') / len(right):.1f}"

    parts = []
    for test, result in found["tests"].items():
        parts.append(f"{test} {rate(result['right'])}")
        parts += [f"{test}/{control} {rate(right)}" for control, right in result.get("controls", {}).items()]
    return ", ".join(parts)


def commit() -> str:
    """The commit that is run, and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
