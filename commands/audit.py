"""`ilvr audit MODEL…`: the door to [`ilvr.evaluation.audit`]."""

import json
import sys
from argparse import Namespace
from pathlib import Path

from ilvr.evaluation import audit
from ilvr.evaluation.audit_results import Audit

from .questions import controls_of, model_kwargs, questions_of


def run(options: Namespace) -> int:
    """Writes `audit.json` and `audit.html` and prints the verdicts."""
    if options.helper_question is not None and options.selection_method is None:
        raise ValueError("--helper_question: is asked by a --selection_method, such as answer_gradient. Name one.")
    named = {name: getattr(options, name) for name in ("selection_method", "helper_question")}
    found = audit(
        options.models,
        questions_of(options),
        output=options.output,
        controls=controls_of(options.controls),
        selection={name: value for name, value in named.items() if value is not None},
        batch_size=options.batch_size,
        pictured=options.pictured,
        model_kwargs=model_kwargs(options),
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
    )
    print(json.dumps(found.to_dict(), indent=2) if options.json else verdicts(found))
    print(f"Written to {Path(options.output, 'audit.html')} and audit.json beside it.", file=sys.stderr)
    return 0


def verdicts(found: Audit) -> str:
    """The verdict of each model with its reasons."""
    lines = []
    for model in found.models:
        lines += [f"{model.model}: {model.verdict.word}", *(f"  {reason}" for reason in model.verdict.reasons)]
    return "\n".join(lines)
