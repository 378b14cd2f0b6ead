"""`ilvr COMMAND …`: parses the arguments, runs the command and turns what goes wrong into one line and a status."""

import sys
from importlib import import_module

from .arguments import build_parser


OK, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130  # 130 as shells do: 128 + SIGINT
EXTRAS = {  # what each installs that a command may miss
    "eval": ("evaluate", "gymnasium", "matplotlib"),
    "demo": ("gradio",),
    "serve": ("fastapi", "openai", "pydantic", "uvicorn"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments (`list[str]`, *optional*, defaults to those of the process): the command's name, then its own.

    Returns:
        `int`: exit status: 0 if all is well; 1 if the command found something wrong or failed; 2 for arguments and
        inputs that it cannot work with; 130 if it was interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = build_parser().parse_args(arguments or ["--help"])
    except SystemExit as stopped:  # how argparse ends after --help, --version and an error
        return int(stopped.code or OK)
    name, options.arguments = options.command, arguments
    try:
        return import_module(f"ilvr_commands.{name.replace('-', '_')}").run(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if options.traceback:
            raise
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        extra = next((extra for extra, packages in EXTRAS.items() if missing in packages), None)
        if extra:
            error = ValueError(f"{missing} is not installed. Add the extra `{extra}`: pip install 'ilvr[{extra}]'.")
        expected = isinstance(error, (ValueError, OSError))
        what = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected else " --traceback shows where."
        print(f"ilvr {name}: {what}{' '.join(str(error).split())}{hint}", file=sys.stderr)
        return WRONG_INPUT if expected else FAILED
