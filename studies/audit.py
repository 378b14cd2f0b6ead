"""Audits the checkpoint of an arm on held-out questions of the task that it trains on, as many as its controls have.

    python -m studies.audit studies/shifts.yaml stage2 --seed 2

The numbers go to `studies/results/NAME/audit-ARM-SEED.json`, of which `python -m studies.page` makes a table; a page
with pictures is left beside the checkpoint, in `runs/studies/NAME/SEED/ARM/audit`.
"""

import argparse
import json
from pathlib import Path

from ilvr.evaluation import Questions, audit

from .run import commit
from .study import Study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("arm")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    study = Study.load(options.study)
    if options.arm not in study.arms:
        parser.error(f"there is no arm {options.arm!r}; choose from {list(study.arms)}")
    audit_arm(study, options.arm, options.seed)


def audit_arm(study: Study, name: str, seed: int) -> None:
    """Runs all controls that the task allows, and saves what they come to.

    Raises:
        ValueError: if the arm was not trained.
    """
    folder = study.runs / study.name / str(seed) / name
    if not (folder / "trainer_state.json").exists():  # saved last
        raise ValueError(f"{folder} holds no trained arm. Run `python -m studies.run` with it first.")
    task = study.task_of(seed, arm=name)  # its own: it says what the arm's spans should hold
    questions = Questions.of_task(task, form=study.arms[name].form, samples=study.controlled)
    found = audit(
        [folder],
        questions,
        output=folder / "audit",
        batch_size=study.batch_size,
        max_new_tokens=study.max_new_tokens,
    )
    result = study.results / study.name / f"audit-{name}-{seed}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    facts = {"arm": name, "seed": seed, "commit": commit(), **found.to_dict()}
    result.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
