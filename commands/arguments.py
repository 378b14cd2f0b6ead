"""What each command takes. Imports nothing that is slow to import."""

import argparse
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from .recipe import Recipe


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "max_help_position": 28})


class Parser(argparse.ArgumentParser):
    """Errors in one line; options are written `--with_underscores`, as those of transformers, or `--with-dashes`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=_HelpFormatter)

    def add(self, *names: str, **kwargs: Any) -> None:
        """Adds an argument; the help says the default of an option that has one."""
        if kwargs.get("default") not in (None, argparse.SUPPRESS, []):
            kwargs["help"] += " (default: %(default)s)"
        self.add_argument(*names, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = [underscored(arg) for arg in args]
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}.")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. --help lists all.\n")


def underscored(argument: str) -> str:
    """`--with-dashes` as `--with_underscores`; what is no option stays as it is."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"ilvr {version('ilvr')}")
        parser.exit()


def build_parser() -> Parser:
    """The parser of all commands; what it parses has the name of the command in `command`."""
    parser = Parser(prog="ilvr", description="Vision-language models that think in latents.")
    parser.add("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, epilog, add_arguments) in COMMANDS.items():
        own = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=epilog)
        add_arguments(own)
        own.add("--traceback", action="store_true", help="show where an error comes from")
    return parser


# --------------------------------------------------------------------------------------------------- what several take


def _add_json(parser: Parser) -> None:
    parser.add("--json", action="store_true", help="print JSON, for machines")


def _add_source(parser: Parser, split: str) -> None:
    formats = "native, reference, mirage, zebra_cot or monet; by default recognised from the fields"
    parser.add("--format", help=formats if split == "train" else f"vsp, choices, {formats}")
    parser.add("--image_root", help="folder that holds all images; by default that of the data")
    parser.add("--split", default=split, help="split of a folder or Hub id")
    parser.add("--name", help="configuration of a Hub id")


def _add_model_options(parser: Parser) -> None:
    parser.add("--dtype", default="auto", help="of the weights; `auto` is that of the checkpoint")
    parser.add("--attn_implementation", help="eager, sdpa, …")


def _add_address(parser: Parser, port: int) -> None:
    parser.add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    parser.add("--port", type=int, default=port, help="port to listen at")


def _add_questions(parser: Parser) -> None:
    parser.add("--output", required=True, help="folder of records and results")
    parser.add("--task", help="task of ilvr.tasks, or package.module:Class")
    parser.add("--task_settings", default="{}", help="settings of the task, as JSON")
    parser.add("--form", default="trace", help="form of the task's questions: trace, answer or text")
    parser.add("--dataset", help=".jsonl or .json file, folder or Hub id")
    _add_source(parser, "test")
    parser.add("--metric", help="boxed_exact_match, multiple_choice, …; by default what fits")
    parser.add("--samples", type=int, help="how many questions, evenly spread; by default all")
    parser.add("--batch_size", type=int, default=64, help="questions answered at once")
    parser.add("--max_new_tokens", type=int, default=256, help="longest answer, in tokens")
    _add_model_options(parser)
    parser.add("--seed", type=int, default=0, help="of noise")
    _add_json(parser)


CONTROLS = (
    "another_sample, position_mean, first_latent, noise_0.1, noise_0.3, noise_1.0, zeros, oracle, markers_only, "
    "no_spans, hidden_image"
)
CONTROLS_HELP = f"none, small (another_sample, zeros), all, or names with commas between: {CONTROLS}"

# -------------------------------------------------------------------------------------------------- one function each


def _train(parser: Parser) -> None:
    recipe = "recipe: a YAML file of the fields below, or the name of one that comes with the package, as shifts_small"
    parser.add("config", nargs="?", default=argparse.SUPPRESS, help=recipe)
    parser.add_argument("--config", help=argparse.SUPPRESS)  # the same, as TRL's scripts have it
    parser.add("--set", action="append", default=[], metavar="NAME=VALUE", help="set a field, or a part of one")
    launcher = (
        "train in the processes of `accelerate launch`: a config file, or ddp, deepspeed_zero2, deepspeed_zero3, fsdp2"
    )
    parser.add("--accelerate_config", help=launcher)
    parser.add("--num_processes", type=int, help="in place of those that --accelerate_config names")
    parts = []
    for field in fields(Recipe):
        if field.default is MISSING:
            parts.append(f"  {field.name:<20} {field.metadata['help']}")
        elif isinstance(field.default, bool):
            parser.add(
                f"--{field.name}", nargs="?", const=True, type=_bool, metavar="BOOL", help=field.metadata["help"]
            )
        else:
            kind = str if field.default is None else type(field.default)
            default = "" if field.default is None else f" (default: {field.default})"
            parser.add(f"--{field.name}", type=kind, help=field.metadata["help"] + default)
    parser.epilog = "\n".join(["fields with parts, for the recipe and --set:", *parts, "", parser.epilog or ""])


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


_bool.__name__ = "bool"  # for argparse's message


def _generate(parser: Parser) -> None:
    parser.add("model", help="folder or Hub id of an ILVR checkpoint")
    parser.add("image", help="file of the picture that is asked about")
    parser.add("question", help="what is asked")
    parser.add("--picture", help="write what the latents resemble to this PNG")
    parser.add("--max_new_tokens", type=int, default=256, help="longest answer, in tokens")
    parser.add("--temperature", type=float, default=0.0, help="of sampled words; 0: the likeliest ones")
    parser.add("--seed", type=int, default=0, help="of sampled words")
    _add_model_options(parser)
    _add_json(parser)


def _evaluate(parser: Parser) -> None:
    parser.add("model", help="folder or Hub id of an ILVR checkpoint")
    _add_questions(parser)
    parser.add("--controls", default="small", help=CONTROLS_HELP)
    parser.add("--control_samples", type=int, default=64, help="questions asked under controls, evenly spread")


def _audit(parser: Parser) -> None:
    parser.add("models", nargs="+", help="folders or Hub ids of ILVR checkpoints")
    _add_questions(parser)
    parser.add("--controls", default="all", help=CONTROLS_HELP)
    selection = "what latents should hold is what each model selects, not what the task says"
    parser.add("--selection_method", help=f"{selection}: by answer_gradient, query_top_p, …")
    parser.add("--helper_question", help="asked of helper images then; by default the task's, or the trace answers")
    parser.add("--pictured", type=int, default=3, help="samples pictured for each model")


def _demo(parser: Parser) -> None:
    parser.add("model", help="folder or Hub id of an ILVR checkpoint")
    parser.add("--task", help="task of ilvr.tasks, or package.module:Class, to choose examples from")
    parser.add("--task_settings", default="{}", help="settings of the task, as JSON")
    parser.add("--examples", type=int, default=24, help="test questions to choose from, evenly spread")
    parser.add("--max_new_tokens", type=int, default=256, help="longest answer, in tokens")
    _add_address(parser, port=7860)
    parser.add("--share", action="store_true", help="also give the page a public address, by Gradio's servers")
    _add_model_options(parser)


def _serve(parser: Parser) -> None:
    parser.add("model", help="folder or Hub id of an ILVR checkpoint")
    parser.add("--served_model_name", help="by which requests ask for the model; by default as it is given here")
    _add_address(parser, port=8000)
    parser.add("--fetch_images", action="store_true", help="also load images from the http(s) addresses of requests")
    parser.add("--cors", action="store_true", help="let pages of other sites send requests")
    _add_model_options(parser)


def _check_data(parser: Parser) -> None:
    parser.add("path", help=".jsonl or .json file, folder or Hub id")
    _add_source(parser, "train")
    parser.add("--processor", help="checkpoint or backbone (Hub id or folder) to count tokens with")
    parser.add("--max_length", type=int, help="longest sample allowed, in tokens")
    parser.add("--decode_images", action="store_true", help="decode each image, and not only its header")
    parser.add("--output", help="write the report to this JSON file")
    _add_json(parser)


def _card(parser: Parser) -> None:
    parser.add("model_dir", help="folder of a checkpoint")
    parser.add("--repo_id", help="Hub id that the card's code loads; by default what is saved")
    parser.add("--base_model", help="Hub id of the backbone")
    parser.add("--license", help="of the weights; by default that of the base model's card")
    parser.add("--dataset", help="Hub id of the training data")


def _push(parser: Parser) -> None:
    parser.add("model_dir", help="folder of a checkpoint; its subfolders stay")
    parser.add("repo_id", help="where to: USER/NAME; created if there is none")
    parser.add("--dry_run", action="store_true", help="say which files would go, and upload none")
    parser.add("--private", action="store_true", help="if the repository is created, only you see it")
    parser.add("--revision", help="branch to upload to, created if there is none; by default main")
    parser.add("--tag", help="name of a tag for what is uploaded")
    parser.add("--message", help="of the commit")
    parser.add("--space", help="USER/NAME of a Space that shows the model in `ilvr demo`; it goes up, too")
    parser.add("--space_package", help="what pip installs ILVR from in the Space; by default this version on PyPI")
    parser.add("--task", help="task of ilvr.tasks that the Space offers examples of")
    parser.add("--task_settings", default="{}", help="settings of the task, as JSON")
    _add_json(parser)


def _convert(parser: Parser) -> None:
    parser.add("checkpoint", help="folder or Hub id of the reference checkpoint")
    parser.add("output_dir", help="new folder for the ILVR checkpoint")
    parser.add("--dtype", default="auto", help="of the saved weights; `auto` is that of the checkpoint")


# name: what it does, examples, what it takes
COMMANDS: dict[str, tuple[str, str, Callable[[Parser], None]]] = {
    "train": (
        "train a model on data of your own or on a task, in two stages, test it, and write a report",
        "examples:\n  ilvr train recipe.yaml --dataset train.jsonl --test_dataset test.jsonl\n"
        "  ilvr train recipe.yaml --seed 1 --set stage1.max_steps=10 --set training.learning_rate=1e-5\n"
        "  ilvr train qwen2_5_vl_7b --dataset train.jsonl --accelerate_config fsdp2 --num_processes 4",
        _train,
    ),
    "generate": (
        "answer a question about a picture, word for word, with the latents between the words",
        'example:\n  ilvr generate runs/ilvr/stage2 photo.png "Which cup hides the ball?" --picture latents.png',
        _generate,
    ),
    "evaluate": (
        "answer questions with a checkpoint, score them, replace its latents",
        "example:\n  ilvr evaluate runs/ilvr/stage2 --dataset test.jsonl --metric multiple_choice --output runs/test",
        _evaluate,
    ),
    "audit": (
        "say whether models use their latents, and what these hold: numbers, a verdict, a page",
        "example:\n  ilvr audit runs/ilvr/stage1 runs/ilvr/stage2 --dataset test.jsonl --output runs/audit",
        _audit,
    ),
    "demo": (
        "a page in the browser: ask, look into each span of latents, replace it, compare the answers",
        'example:\n  ilvr demo runs/ilvr/stage2 --task shifts --task_settings \'{"boards": 1, "test_boards": 24}\'',
        _demo,
    ),
    "serve": (
        "answer over HTTP: chat with images in OpenAI's protocol, with streaming",
        "example:\n  ilvr serve runs/ilvr/stage2 --served_model_name ilvr --port 8000",
        _serve,
    ),
    "check-data": (
        "report what is in a data set and what is wrong with it; loads no model",
        "example:\n  ilvr check-data train.jsonl --image_root images --decode_images",
        _check_data,
    ),
    "card": (
        "write a checkpoint's model card again, from what is saved beside its weights",
        "example:\n  ilvr card runs/ilvr/stage2 --repo_id USER/NAME --base_model Qwen/Qwen2.5-VL-7B-Instruct",
        _card,
    ),
    "push": (
        "upload a checkpoint to the Hub, with the token of `hf auth login`",
        "examples:\n  ilvr push runs/ilvr/stage2 USER/NAME --dry_run\n"
        "  ilvr push runs/ilvr/stage2 USER/NAME --private --tag v1\n"
        "  ilvr push runs/ilvr/stage2 USER/NAME --space USER/NAME-demo --task shifts",
        _push,
    ),
    "convert": (
        "turn a checkpoint of the paper's code into an ILVR checkpoint",
        "example:\n  ilvr convert reference-checkpoint ilvr-7b --dtype bfloat16",
        _convert,
    ),
}
