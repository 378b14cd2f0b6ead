"""`ilvr COMMAND …`: finds the subcommand, and imports its module and no other command's."""

import sys
from importlib import import_module


# name: (module with `main(arguments) -> exit status`, one line of help)
COMMANDS = {
    "convert": ("ilvr.commands.convert", "turn a checkpoint of the paper's code into an ILVR checkpoint"),
    "evaluate": ("ilvr.commands.evaluate", "answer questions with a checkpoint, score them, replace its latents"),
    "audit": ("ilvr.commands.audit", "does a model use its latents, and what do they hold? numbers and a page"),
    "check-data": ("ilvr.commands.check_data", "report what is in a data set and what is wrong with it"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        arguments (`list[str]`, *optional*, defaults to those of the process): the subcommand's name, then its own.

    Returns:
        `int`: exit status, 0 if all is well.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        try:
            return import_module(COMMANDS[name][0]).main(arguments[1:])
        except KeyboardInterrupt:
            return 130  # as shells do: 128 + SIGINT
    usage = "usage: ilvr COMMAND [-h] …\n\n" + "\n".join(f"  {key:<12} {text}" for key, (_, text) in COMMANDS.items())
    if name in ("-h", "--help"):
        print(usage)
        return 0
    print(f"ilvr: there is no command {name!r}.\n{usage}", file=sys.stderr)
    return 2
