"""The door of all commands: quick help, one style of arguments, one line and a status for what goes wrong."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ilvr import __version__
from ilvr.evaluation.controls import CONTROLS, SMALL
from ilvr_commands import arguments, convert
from ilvr_commands.main import main


def test_help_lists_the_commands_and_version_is_the_packages(capsys):
    assert main(["--help"]) == main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown or f"  {name}\n" in shown for name in arguments.COMMANDS)
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"ilvr {__version__}\n"


@pytest.mark.parametrize("name", arguments.COMMANDS)
def test_help_of_a_command(name, capsys):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: ilvr {name} " in shown and "example" in shown and "--traceback" in shown


def test_help_imports_nothing_slow():
    """All parsers are built, and of the packages that take long to import none is."""
    code = """
import sys
from ilvr_commands.main import main
for arguments in ([], ["--version"], ["evaluate", "--help"], ["demo", "--help"], ["serve", "--help"]):
    assert main(arguments) == 0
slow = {"torch", "transformers", "numpy", "datasets", "trl", "huggingface_hub", "gradio", "fastapi", "ilvr"}
print(sorted(slow & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_controls_are_named_in_the_help():
    assert arguments.CONTROLS.split(", ") == [*CONTROLS] and f"small ({', '.join(SMALL)})" in arguments.CONTROLS_HELP


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["chek-data"], "ilvr: argument COMMAND: invalid choice: 'chek-data'"),
        (["check-data"], "ilvr check-data: the following arguments are required: path. --help lists all."),
        (["check-data", "x", "--formt", "y"], "ilvr check-data: unknown arguments: --formt y. --help lists all."),
        (["check-data", "x", "--form", "y"], "ilvr check-data: unknown arguments: --form y. --help lists all."),
        (["check-data", "x", "--max_length", "y"], "ilvr check-data: argument --max_length: invalid int value: 'y'."),
    ],
)
def test_wrong_arguments_are_one_line(command, message, capsys):
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_options_may_have_dashes(capsys):
    assert main(["check-data", "none.jsonl", "--image-root=.", "--decode-images"]) == 2
    assert capsys.readouterr().err == "ilvr check-data: There is no file none.jsonl. Correct the path.\n"


def test_errors_are_one_line_unless_the_traceback_is_asked_for(monkeypatch, capsys):
    def fail(error):
        def convert_checkpoint(*_, **__):
            raise error

        monkeypatch.setattr(convert, "convert_checkpoint", convert_checkpoint)

    fail(ValueError("wrong\n  folder"))
    assert main(["convert", "a", "b"]) == 2 and capsys.readouterr().err == "ilvr convert: wrong folder\n"
    with pytest.raises(ValueError, match="wrong"):
        main(["convert", "a", "b", "--traceback"])
    fail(RuntimeError("a mistake of ours"))
    assert main(["convert", "a", "b"]) == 1
    assert capsys.readouterr().err == "ilvr convert: RuntimeError: a mistake of ours --traceback shows where.\n"
    fail(KeyboardInterrupt())
    assert main(["convert", "a", "b"]) == 130


PAGES = Path(__file__).parents[2]
NAMES = ("audit", "data", "demo", "from_reference_code", "hub", "serving", "start")
WITH_COMMANDS = ["README.md", *(f"docs/{name}.md" for name in NAMES)]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_on_pages_are_right(page):
    """Every command in a block of a page parses."""
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```$", (PAGES / page).read_text(), re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("ilvr ")]
    assert lines
    for line in lines:
        arguments.build_parser().parse_args(shlex.split(line, comments=True)[1:])
