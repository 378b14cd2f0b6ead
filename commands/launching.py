"""`--accelerate_config`: a command again, in the processes of `accelerate launch`."""

import argparse

from .arguments import underscored
from .packaged import packaged_file


def launch(arguments: list[str], config: str, num_processes: int | None = None) -> None:
    """Runs `ilvr` with the arguments, without those for the launcher, once in each process.

    Args:
        arguments (`list[str]`): of `ilvr`, the command's name first.
        config (`str`): of accelerate: a file, or the name of one that comes with the package, such as `fsdp2`.
        num_processes (`int`, *optional*): in place of those that the config names.

    Raises:
        ValueError: if there is no such config.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--accelerate_config")
    own.add_argument("--num_processes")
    _, rest = own.parse_known_args([underscored(argument) for argument in arguments])
    processes = [] if num_processes is None else ["--num_processes", str(num_processes)]
    file = packaged_file(config, "accelerate", "accelerate config")
    command = ["--config_file", str(file), *processes, "-m", "ilvr_commands", *rest]
    launch_command(launch_command_parser().parse_args(command))
