"""`ilvr audit MODEL…`: the door to [`ilvr.evaluation.audit`]."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from ilvr.evaluation import audit
from ilvr.evaluation.audit_results import Audit

from .question_options import CONTROLS_HELP, QuestionOptions, controls_of, parse


PROG = "ilvr audit"


@dataclass
class AuditOptions(QuestionOptions):
    """Options of `ilvr audit`.

    Args:
        controls (`str`, *optional*, defaults to `"all"`): names of controls; `another_sample` is among them always.
        pictured (`int`, *optional*, defaults to 3): samples pictured for each model.
    """

    controls: str = field(default="all", metadata={"help": CONTROLS_HELP.replace("%", "%%")})
    pictured: int = field(default=3, metadata={"help": "samples pictured for each model"})


def main(arguments: list[str]) -> int:
    """Writes `audit.json` and `audit.html` and prints the verdicts; returns 2 if something cannot be read, else 0."""
    parser = TrlParser(AuditOptions, prog=PROG, description="Does a model use its latents, and what do they hold?")
    parser.add_argument("models", nargs="+", help="folders or Hub ids of ILVR checkpoints")
    parsed = parse(parser, arguments, PROG)
    if parsed is None:
        return 2
    options, positional = parsed
    try:
        found = audit(
            positional.models,
            options.questions(),
            output=options.output,
            controls=controls_of(options.controls),
            batch_size=options.batch_size,
            pictured=options.pictured,
            model_kwargs=options.model_kwargs,
            seed=options.seed,
            **options.generate_kwargs,
        )
    except (ValueError, OSError) as error:
        print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_dict(), indent=2) if options.json else verdicts(found))
    print(f"Written to {Path(options.output, 'audit.html')} and audit.json beside it.", file=sys.stderr)
    return 0


def verdicts(found: Audit) -> str:
    """The verdict of each model with its reasons."""
    lines = []
    for model in found.models:
        lines += [f"{model.model}: {model.verdict.word}", *(f"  {reason}" for reason in model.verdict.reasons)]
    return "\n".join(lines)
