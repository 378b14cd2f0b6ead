"""Writes the tables of a study into its page, from `studies/results/`.

python -m studies.page studies/shifts.yaml
"""

import argparse
import json
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from ilvr.evaluation.controls import LABELS
from ilvr.evaluation.intervals import wilson_interval
from ilvr.evaluation.probes import Rate
from ilvr.evaluation.records import OWN
from ilvr.evaluation.statistics import Difference, holm, mcnemar, paired_difference
from ilvr.trainer.selection import SELECTORS

from .study import Study


PAGE = Path("docs/evidence.md")
CONTROLS = {
    "another_sample": "another sample's",
    "position_mean": "mean",
    "noise_1.0": "noise",
    "zeros": "zeros",
    "donor": "follows donor",
}
ALIGNED = {  # in the log of arms that align latents: heading, and by what it is multiplied
    "latent_cosine": ("cosine with the target", 1),
    "latent_norm_ratio": ("norm over its norm", 1),
    "retrieval_at_1": ("latent nearest to the target, %", 100),
    "followed_share": ("targets are the followed patch, %", 100),
}
OF_PATCHES = ("retrieval_at_1", "followed_share")  # which say nothing where a target is no patch
PATCH_METHODS = {method for method, selector in SELECTORS.items() if selector.keeps_candidates}
INGREDIENTS = {  # by study: what an arm goes without, that arm, and the one that has it
    "shifts": [
        ("targets that hold what is followed", "query", "stage1"),
        ("words that name the step", "unnamed", "stage1"),
        ("something fed back", "pads", "stage1"),
        ("its own latents in stage 1", "given_latents", "stage1"),
        ("latents as long as features", "identity", "stage1"),
        ("both of these", "identity_given", "stage1"),
        ("a slow stage 2", "stage2_fast", "stage2"),
        ("one latent after the other", "stage2_parallel", "stage2"),
        ("a gradient through the latents", "stage2_constant", "stage2"),
    ]
}
NEEDED = 10  # points, by which an arm falls without an ingredient that it needs
HELD_OUT = {"held out, %": "eval_accuracy", "… with another sample's latents, %": "eval_swapped_accuracy"}
Found = dict[str, dict[int, dict[str, Any]]]  # by arm and seed, what `studies.run` measured
Rule = tuple[str, list[str], Callable[[], tuple[str, bool]]]  # what has to hold, the arms it needs, value and verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    study = Study.load(parser.parse_args().study)
    found = load(study)
    text = PAGE.read_text(encoding="utf-8")
    start, end = f"<!-- results: {study.name} -->", f"<!-- /results: {study.name} -->"
    tables = f"{start}\n{report(study, found)}\n{end}"
    text, number = re.subn(f"{start}.*{end}", lambda _: tables, text, flags=re.DOTALL)
    if not number:
        raise ValueError(f"{PAGE} has no lines {start} and {end} to write between.")
    PAGE.write_text(text, encoding="utf-8")


def load(study: Study) -> Found:
    """All results of a study, the arms in their order."""
    found: Found = {}
    for name in study.arms:
        files = sorted((study.results / study.name).glob(f"{name}-*.json"))
        own = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        if kept := {result["seed"]: result for result in own if result["arm"] == name}:
            found[name] = kept
    return found


def report(study: Study, found: Found) -> str:
    """The tables in Markdown."""
    every = [result for runs in found.values() for result in runs.values()]
    commits = ", ".join(sorted({result["commit"] for result in every}))
    devices = ", ".join(sorted({result["device"] for result in every}))
    parts = [f"Commits {commits}, on {devices}.", "### Accuracy", accuracy_table(study, found)]
    if missing := [name for name in study.arms if name not in found]:
        parts.append(f"Defined and not run: {', '.join(missing)}.")
    parts += ["### With other latents", controls_table(study, found)]
    parts += ["### By difficulty", groups_table(found)]
    if any(aligns(result) for result in every):
        parts += ["### What latents are aligned with", alignment_table(found)]
    if study.name in INGREDIENTS:
        parts += ["### Without one ingredient", ingredients_table(INGREDIENTS[study.name], found)]
    if any("held_out" in result for result in every):
        parts += ["### While they were trained", curves_table(found)]
    if study.name in RULES:
        parts += ["### The rules", rules_table(RULES[study.name](found), found)]
    for file in sorted((study.results / study.name).glob("audit-*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        parts += [f"### A full audit: {facts['arm']}, seed {facts['seed']}", audit_table(facts), audit_reasons(facts)]
    return "\n\n".join(parts)


def accuracy_table(study: Study, found: Found) -> str:
    others = [test for test in study.tests if test != "trained"]
    tests = [f"*{test}*, %" for test in others]
    rows = [["arm", "what it is", "*trained*, %", "seeds", *tests, "tokens", "spans", "training, s"]]
    for name, runs in found.items():
        trained = [rate(result["tests"]["trained"]["right"]) for result in runs.values()]
        further = [mean(rate(result["tests"][test]["right"]) for result in runs.values()) for test in others]
        size = next(iter(runs.values()))["tests"]["trained"]
        right = "".join(result["tests"]["trained"]["right"] for result in runs.values())
        low, high = (100 * end for end in wilson_interval(right.count("1"), len(right)))
        rows.append(
            [
                name,
                study.arms[name].note,
                f"**{mean(trained):.1f}** ({low:.1f} – {high:.1f})",
                ", ".join(f"{seed}: {value:.1f}" for seed, value in zip(runs, trained)),
                *(f"{value:.1f}" for value in further),
                f"{size['tokens']:.0f}",
                f"{size['spans']:.1f}",
                f"{mean(result['seconds'] for result in runs.values()):.0f}",
            ]
        )
    return table(rows)


def controls_table(study: Study, found: Found) -> str:
    rows = [["arm", "own", *CONTROLS.values(), "own − another sample's, points", "McNemar p, worst seed"]]
    for name, runs in found.items():
        controls = [result["tests"]["trained"].get("controls") for result in runs.values()]
        if not all(controls):
            continue
        pooled = {key: "".join(own[key] for own in controls if key in own) for key in ("own", *CONTROLS)}
        cost = difference(pooled["own"], pooled["another_sample"])
        p = max(mcnemar(as_bools(own["own"]), as_bools(own["another_sample"])) for own in controls)
        shares = [f"{rate(pooled[key]):.1f}" if pooled[key] else "" for key in ("own", *CONTROLS)]
        rows.append([name, *shares, cost, f"{p:.1g}"])
    return table(rows)


def groups_table(found: Found) -> str:
    groups: dict[str, None] = {}
    by_arm: dict[str, dict[str, list[str]]] = {}
    for name, runs in found.items():
        own = by_arm.setdefault(name, {})
        for result in runs.values():
            for test in result["tests"].values():
                for group, right in zip(test["groups"], test["right"]):
                    groups[group] = None
                    own.setdefault(group, []).append(right)
    order = sorted(groups, key=lambda group: [int(number) for number in re.findall(r"\d+", group)])
    rows = [["arm", *(group.split()[0] for group in order)]]
    for name, own in by_arm.items():
        rows.append([name, *(f"{rate(''.join(own[group])):.0f}" if group in own else "" for group in order)])
    return table(rows)


def aligns(result: dict[str, Any]) -> bool:
    return bool(result["log"]) and "latent_norm_ratio" in result["log"][-1]


def alignment_table(found: Found) -> str:
    """What arms that align latents logged last, the mean over seeds."""
    rows = [["arm", *(heading for heading, _ in ALIGNED.values())]]
    for name, runs in found.items():
        if not all(aligns(result) for result in runs.values()):
            continue
        logs = [result["log"][-1] for result in runs.values()]
        methods = {result["definition"]["arm"]["settings"]["selection_method"] for result in runs.values()}
        cells = []
        for key, (_, scale) in ALIGNED.items():
            is_known = all(key in log for log in logs) and (key not in OF_PATCHES or methods <= PATCH_METHODS)
            digits = 1 if scale > 1 else 2
            cells.append(f"{scale * mean(log[key] for log in logs):.{digits}f}" if is_known else "")
        rows.append([name, *cells])
    return table(rows)


def ingredients_table(ingredients: list[tuple[str, str, str]], found: Found) -> str:
    """What arms lose without an ingredient, on *trained*, over the boards of the seeds that both arms have."""
    rows = [["without", "arm", "seeds", "beside", "loses, points", "McNemar p, Holm", "needed"]]
    known = {
        less: (what, whole)
        for what, less, whole in ingredients
        if set(found.get(less, ())) & set(found.get(whole, ()))  # seeds
    }
    answers = {
        less: [as_bools(pooled_answers(found, *arms)) for arms in ((whole, less), (less, whole))]
        for less, (_, whole) in known.items()
    }
    p_values = holm({less: mcnemar(*pair) for less, pair in answers.items()})
    for less, (what, whole) in known.items():
        gap = paired_difference(*answers[less])
        needed = "yes" if 100 * gap.low >= NEEDED else "no" if 100 * gap.high < NEEDED else "open"
        seeds = sorted(set(found[less]) & set(found[whole]))
        p_value = f"{p_values[less]:.1g}" if p_values[less] else "< 1e-300"
        rows.append([what, less, ", ".join(map(str, seeds)), whole, points(gap), p_value, needed + so_far(seeds)])
    return table(rows)


def curves_table(found: Found) -> str:
    """The mean over seeds of what arms were asked while they trained, and of their rewards, by step."""
    watched = {name: runs for name, runs in found.items() if all("held_out" in result for result in runs.values())}
    curves: dict[tuple[str, str], dict[int, list[float]]] = {}
    for name, runs in watched.items():
        for result in runs.values():
            for entry in result["held_out"]:
                for what, key in HELD_OUT.items():
                    if key == "eval_swapped_accuracy" and entry["eval_emission_rate"] == 0:
                        continue  # there is nothing to swap
                    curves.setdefault((name, what), {}).setdefault(entry["step"], []).append(100 * entry[key])
            for entry in result["log"]:
                if "reward" in entry:
                    curves.setdefault((name, "reward"), {}).setdefault(entry["step"], []).append(entry["reward"])
    steps = sorted({entry["step"] for runs in watched.values() for own in runs.values() for entry in own["held_out"]})
    rows = [["arm", "by step", *map(str, steps)]]
    for (name, what), values in curves.items():
        digits = 2 if what == "reward" else 1
        rows.append([name, what, *(f"{mean(values[step]):.{digits}f}" if step in values else "" for step in steps)])
    return table(rows)


def rules_of_shifts(found: Found) -> list[Rule]:
    """The rules of acceptance of shifts."""
    pooled = partial(pooled_answers, found)

    def above(other: str) -> Callable[[], tuple[str, bool]]:
        def measured() -> tuple[str, bool]:
            gap = gap_between(found, "stage2", other)
            return points(gap), 100 * gap.low >= 50

        return measured

    def share(bar: float, **where: Any) -> Callable[[], tuple[str, bool]]:
        return lambda: (f"{rate(pooled('stage2', **where)):.1f} %", rate(pooled("stage2", **where)) >= bar)

    def oracle() -> tuple[str, bool]:
        gap = gap_between(found, "oracle2", "stage2")
        return points(gap), 100 * gap.high <= 1

    def keeps() -> tuple[str, bool]:
        gap = gap_between(found, "stage2", "stage1")
        return points(gap), gap.value >= 0

    cost, followed = rules_of_use(found, "stage2")
    return [
        ("accuracy at least 98 %", ["stage2"], share(98)),
        ("at most 1 point below the oracle", ["stage2", "oracle2"], oracle),
        ("50 points above answer-only", ["stage2", "answer_only"], above("answer_only")),
        ("50 points above the deeper answer-only", ["stage2", "answer_only_deep"], above("answer_only_deep")),
        cost,
        followed,
        ("stage 2 at least as good as stage 1", ["stage2", "stage1"], keeps),
        ("80 % on *longer*", ["stage2"], share(80, test="longer")),
    ]


def rules_of_use(found: Found, arm: str) -> list[Rule]:
    """Whether the latents of an arm are used: what others cost, and whose answer it gives with them."""

    def swapped() -> tuple[str, bool]:
        own, other = (as_bools(pooled_answers(found, arm, control=name)) for name in ("own", "another_sample"))
        gap = paired_difference(own, other)
        return points(gap), 100 * gap.low >= 60

    def followed() -> tuple[str, bool]:
        share = rate(pooled_answers(found, arm, control="donor"))
        return f"{share:.1f} %", share >= 90

    controls = [result["tests"]["trained"].get("controls", {}) for result in found.get(arm, {}).values()]
    has_donors = all("donor" in own for own in controls)  # only samples with spans have any
    return [
        ("another sample's latents cost 60 points", [arm], swapped),
        ("the donor of the last span is followed in 90 %", [arm] if has_donors else [], followed),
    ]


def rules_of_glyphs(found: Found) -> list[Rule]:
    """The bar of glyphs, for moves learned at once and in small steps: 20 points above words in as many positions, and
    so at six moves. Of the small steps also that the latents are used."""
    at_once, small = ["oracle2", "text_equal2"], ["several2", "words_several2"]

    def above_words(arms: list[str], group: str | None = None) -> tuple[str, bool]:
        gap = gap_between(found, *arms, group=group)
        return points(gap), 100 * gap.low >= 20

    return [
        ("20 points above words in as many positions", at_once, partial(above_words, at_once)),
        ("… at six moves", at_once, partial(above_words, at_once, "6 moves")),
        ("in small steps: 20 points above words in as many positions", small, partial(above_words, small)),
        ("… at six moves", small, partial(above_words, small, "6 moves")),
        *((f"… {rule}", arms, measure) for rule, arms, measure in rules_of_use(found, small[0])),
    ]


def rules_of_frozen_lake(found: Found) -> list[Rule]:
    """The bar of FrozenLake: plans that end on the goal, over the four sizes."""

    def plans() -> tuple[str, bool]:
        share = rate(pooled_answers(found, "stage2"))
        return f"{share:.1f} %", share >= 90

    return [("plans of stage 2 end on the goal in 90 %", ["stage2"], plans)]


def audit_table(facts: dict[str, Any]) -> str:
    """What `studies.audit` found under each control."""
    (model,) = facts["models"]
    rows = [["in the place of the latents", "right, %", "costs, points", "McNemar p, Holm", "other answers, %"]]
    rows.append([LABELS[OWN], percent(model["accuracy"]), "", "", ""])
    for name, own in model["controls"].items():
        gap = Difference(**own["difference"])
        changed = f"{100 * own['answers_changed']:.1f}"
        rows.append([LABELS[name], percent(own["accuracy"]), points(gap), f"{own['p_adjusted']:.1g}", changed])
    return table(rows)


def audit_reasons(facts: dict[str, Any]) -> str:
    """Its verdict, what the latents hold, and where this comes from."""
    (model,) = facts["models"]
    content = model["content"]
    held = []
    if content["norm"] and content["feature_norm"]:
        held.append(f"norms {content['norm']:.3g}, of what they should hold {content['feature_norm']:.3g}")
    if content["retrieval_at_1"]:
        held.append(f"nearest to the patch that they should hold in {Rate(**content['retrieval_at_1'])}")
    if content["probe"] and content["ceiling"]:
        probe, ceiling = (Rate(**content[name]["accuracy"]) for name in ("probe", "ceiling"))
        held.append(f"a linear probe reads this patch off them in {probe}, off the features in {ceiling}")
    lines = [f"Verdict: **{model['verdict']['word']}** ({facts['samples']} questions, {facts['commit']})."]
    lines += [" ".join(model["verdict"]["reasons"])]
    lines += [f"Latents: {'; '.join(held)}."] if held else []
    return "\n".join(lines)


def percent(rate: dict[str, Any]) -> str:
    return str(Rate(**rate)).replace(" %", "")


RULES = {"shifts": rules_of_shifts, "glyphs": rules_of_glyphs, "frozen_lake": rules_of_frozen_lake}


def pooled_answers(
    found: Found, arm: str, *others: str, test: str = "trained", control: str | None = None, group: str | None = None
) -> str:
    """Which answers of an arm are right, over the seeds that the others have as well."""
    seeds = sorted(set.intersection(*(set(found[name]) for name in (arm, *others))))
    answers = []
    for result in (found[arm][seed]["tests"][test] for seed in seeds):
        right = result["right"] if control is None else result["controls"][control]
        answers += (
            right if group is None else [bit for bit, own in zip(right, result["groups"], strict=True) if own == group]
        )
    return "".join(answers)


def gap_between(found: Found, one: str, other: str, **where: Any) -> Difference:
    """The paired difference of two arms, see [`pooled_answers`]."""
    return paired_difference(
        as_bools(pooled_answers(found, one, other, **where)), as_bools(pooled_answers(found, other, one, **where))
    )


def rules_table(rules: list[Rule], found: Found) -> str:
    """Each rule of acceptance with what was measured, over the seeds that all its arms have."""
    rows = [["rule", "measured", "seeds", "holds"]]
    for rule, arms, measure in rules:
        if not arms or not all(arm in found for arm in arms):
            rows.append([rule, "not run", "0", ""])
            continue
        value, holds = measure()
        seeds = set.intersection(*(set(found[arm]) for arm in arms))
        rows.append([rule, value, str(len(seeds)), ("yes" if holds else "**no**") + so_far(seeds)])
    return table(rows)


def so_far(seeds: Collection[int]) -> str:
    """What is added to a verdict: all are of three seeds."""
    return "" if len(seeds) >= 3 else ", so far"


def difference(first: str, second: str) -> str:
    return points(paired_difference(as_bools(first), as_bools(second)))


def points(gap: Any) -> str:
    return f"{100 * gap.value:+.1f} ({100 * gap.low:+.1f} – {100 * gap.high:+.1f})"


def as_bools(right: str) -> list[bool]:
    return [letter == "1" for letter in right]


def rate(right: str) -> float:
    return 100 * right.count("1") / len(right)


def table(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
