"""The wheel and the source distribution: what is in them, and that the wheel works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "runs", "dist", "__pycache__", "*.egg-info")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Warning" not in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built) -> Path:
    """The wheel, unpacked; on `PYTHONPATH` it comes before the checkout."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(built / "site")
    return built / "site"


def run(installed, *command, **options):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=installed.parent, **options
    )


def files(*folders) -> set[str]:
    return {file.relative_to(ROOT).as_posix() for folder in folders for file in (ROOT / folder).rglob("*.py")}


def test_the_wheel_holds_all_modules_and_what_they_read(installed):
    found = {file.relative_to(installed).as_posix() for file in installed.rglob("*") if file.is_file()}
    rooms = ("trainer", "data", "tasks", "evaluation", "hub_cards")
    expected = {f"ilvr/{name}" for name in files(*rooms)}
    expected |= {name.replace("modeling_ilvr/", "ilvr/") for name in files("modeling_ilvr")}
    expected |= {name.replace("commands/", "ilvr_commands/", 1) for name in files("commands")}
    assert {name for name in found if name.endswith(".py")} == expected
    for folder, place in (("recipes", "recipes"), ("accelerate", "accelerate")):
        for file in (ROOT / "examples" / folder).glob("*.yaml"):
            assert f"ilvr_commands/{place}/{file.name}" in found
    assert {"ilvr/py.typed", "ilvr/hub_cards/model_card_template.md"} < found
    assert {f"ilvr/evaluation/{file.name}" for file in (ROOT / "evaluation").glob("*.html")} < found


def test_the_source_distribution_holds_all_that_its_tests_need(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        found = {name.partition("/")[2] for name in sdist.getnames()}
    kept = ("tests", "docs", "examples", "benchmarks", "studies")
    expected = {
        file.relative_to(built / "source").as_posix()
        for folder in kept
        for file in (built / "source" / folder).rglob("*")
        if file.is_file()
    }
    expected |= {"Makefile", "constraints.txt", "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "mkdocs.yml"}
    assert expected <= found, sorted(expected - found)[:10]


def test_the_wheel_trains_by_the_name_of_a_recipe(installed, tmp_path):
    code = """
import sys, ilvr, ilvr_commands
from ilvr_commands.main import main
print(ilvr.__file__, ilvr_commands.__file__)
print("a name that is none:", main(["train", "shift_small"]))
sys.exit(main(["train", "shifts_small", *sys.argv[1:]]))
"""
    few = {"boards": 4, "base_boards": 4, "test_boards": 2}
    settings = [f"task_settings.{name}={value}" for name, value in few.items()]
    settings += [f"{phase}.max_steps=1" for phase in ("base", "answer_only", "text", "stage1", "stage2")]
    settings += ["small_backbone={hidden_size: 32, num_layers: 1, vision_hidden_size: 32, vision_layers: 1}"]
    settings += ["training.per_device_train_batch_size=2", "base.per_device_train_batch_size=2"]
    settings += ["stage2.per_device_train_batch_size=2", "evaluation.controls=0", "evaluation.max_new_tokens=4"]
    chosen = [part for setting in settings for part in ("--set", setting)]
    done = run(installed, "-c", code, "--output_dir", str(tmp_path), *chosen)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0].count(str(installed)) == 2
    assert "a name that is none: 2" in done.stdout and "none of frozen_lake_sizes, frozen_lake_small" in done.stderr
    assert "the same" in done.stdout and (tmp_path / "stage2" / "model.safetensors").exists()


def test_loading_needs_no_more_than_the_core(installed):
    """Models, trainers and readers, without what the extras bring."""
    code = """
import sys
extras = {"evaluate", "gymnasium", "matplotlib", "gradio", "fastapi", "openai", "mkdocs", "pygame"}
class NoExtras:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in extras:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, NoExtras())
import ilvr
print(sorted({"trl", "peft", "datasets", *extras} & set(sys.modules)))
import ilvr.data, ilvr.hub_cards, ilvr.trainer
print(sorted(extras & set(sys.modules)))
from ilvr_commands.main import main
print(main(["evaluate", "nowhere", "--dataset", "x", "--output", "y"]))
"""
    done = run(installed, "-c", code)
    assert done.stdout.splitlines() == ["[]", "[]", "2"], done.stderr[-2000:]
    assert "Add the extra `eval`: pip install 'ilvr[eval]'." in done.stderr
