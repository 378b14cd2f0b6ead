"""`ilvr evaluate MODEL`: the door to [`ilvr.evaluation.Evaluator`] and its controls."""

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ilvr.evaluation import Evaluator, Questions, scores_by_group
from ilvr.evaluation.auditing import compare, load_checkpoint
from ilvr.evaluation.controls import LABELS, check_controls, run_controls
from ilvr.evaluation.metrics import plain_rates
from ilvr.evaluation.probes import Rate
from ilvr.evaluation.records import OWN, Run

from .questions import controls_of, model_kwargs, questions_of


def run(options: Namespace) -> int:
    """Prints the results and writes them to `results.json`."""
    results = evaluate(options)
    text = json.dumps(results, indent=2)
    Path(options.output, "results.json").write_text(text + "\n", encoding="utf-8")
    print(text if options.json else tables(results))
    return 0


def evaluate(options: Namespace) -> dict[str, Any]:
    """Answers all questions, and some of them under controls.

    Args:
        options (`Namespace`): what `ilvr evaluate` takes.

    Returns:
        `dict`: `model`, `questions`, `metric`, `scores` (what the metric found), `spans_per_sample`, `without_span`,
        `unfinished` (share of answers cut off by `max_new_tokens`), and `controls` by name, if any were run.
    """
    names = controls_of(options.controls)
    check_controls(names or [])
    questions = questions_of(options)
    if names is None or "oracle" in names:
        raise ValueError("--controls: the oracle looks at helper images, and so is run by `ilvr audit`. Name others.")
    model, processor = load_checkpoint(options.model, **model_kwargs(options))
    asked = {"batch_size": options.batch_size, "max_new_tokens": options.max_new_tokens}
    run = Evaluator(model, processor, questions, folder=options.output, **asked).run()
    results = {
        "model": options.model,
        "questions": questions.name,
        "metric": questions.metric_name,
        "scores": questions.score(run.answers),
        **_statistics(run),
    }
    if names:
        few = questions.select(options.control_samples)
        evaluator = Evaluator(model, processor, few, folder=Path(options.output, "controls"), **asked)
        results["controls"] = _compared(few, run_controls(evaluator, names, seed=options.seed))
    return results


def _statistics(run: Run) -> dict[str, float]:
    return {
        "spans_per_sample": run.spans_per_sample,
        "without_span": run.without_span,
        "unfinished": sum(not record.finished for record in run.records) / len(run.records),
    }


def _compared(questions: Questions, runs: dict[str, Run]) -> dict[str, Any]:
    own = Rate.of(sum(runs[OWN].right), len(questions))
    found = compare(questions, runs)
    plain = {name: {**asdict(result), "difference": result.difference._asdict()} for name, result in found.items()}
    return {OWN: {"accuracy": asdict(own)}, **plain}


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    scores = results["scores"]
    by_group, others = scores_by_group(scores), plain_rates(scores)
    lines = [["questions", "n", next(iter(by_group.values())).name, *others]]
    for group, score in by_group.items():
        own = [f"{100 * scores[f'{rate}_{group}'.rstrip('_')]:.1f} %" for rate in others]
        lines.append([group or results["questions"], str(score.count), str(score), *own])
    text = _markdown(lines)
    text += (
        f"\n{results['spans_per_sample']:.2f} spans a sample, {100 * results['without_span']:.1f} % without; "
        f"{100 * results['unfinished']:.1f} % of the answers were cut off.\n"
    )
    if "controls" in results:
        lines = [["in place of the latents", "n", "right", "costs, points", "p, adjusted"]]
        for control, found in results["controls"].items():
            rate = Rate(**found["accuracy"])
            costs = [] if control == OWN else [100 * number for number in found["difference"].values()]
            cost = "{:.1f} ({:.1f} to {:.1f})".format(*costs) if costs else ""
            p_value = f"{found['p_adjusted']:.2g}" if costs else ""
            lines.append([LABELS[control], str(rate.count), str(rate), cost, p_value])
        text += "\n" + _markdown(lines)
    return text.rstrip()


def _markdown(lines: list[list[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
