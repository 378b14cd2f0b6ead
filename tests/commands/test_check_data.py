"""The check of a data set, as a function and as `ilvr check-data`."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest
from datasets import Dataset, Image, List
from helpers import MIRAGE, MONET, NATIVE, REFERENCE, ROWS, make_image, make_sample, write_jsonl
from PIL import Image as PILImage

from ilvr.data import check_dataset, load_conversations
from ilvr.trainer.inputs.data_preparation import prepare_dataset
from ilvr_commands.main import main


@pytest.fixture
def mixed(image_root):
    """Two good samples and six bad ones; lines 2 and 10 are blank and good."""
    (image_root / "noise.png").write_bytes(b"no image")
    make_image("red", 640).save(image_root / "large.png")
    lost = {
        **REFERENCE,
        "sequence_plan": [*REFERENCE["sequence_plan"], {"type": "latent", "helper_image": "lost.png"}],
    }
    rows = [
        json.dumps(MIRAGE),
        "",
        '{"text_input": ',
        json.dumps(lost),
        json.dumps({**MIRAGE, "image_input": "../board.png"}),
        json.dumps({**MIRAGE, "image_input": "noise.png"}),
        '"text"',
        json.dumps({**NATIVE, "images": ["large.png", "board.png"]}),
        json.dumps({"question": "?"}),
        json.dumps({**MONET, "data": [*MONET["data"], *MONET["data"]]}),
    ]
    (image_root / "rows.jsonl").write_text("\n".join(rows))
    return str(image_root / "rows.jsonl")


def test_report(mixed, monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 320 * 640)
    report = check_dataset(mixed, show_progress=False)
    assert (report.num_samples, report.num_good, report.is_good) == (9, 2, False)
    found = [(bad.number, bad.field) for bad in report.bad_samples]
    assert found == [
        (3, "line"),
        (4, "sequence_plan[3].helper_image"),
        (5, "image_input[0]"),
        (6, "image_input[0]"),
        (7, "row"),
        (8, "images[0]"),
        (9, "row"),
    ]
    problems = ["no JSON", "no file", "outside", "no image that can be read", "JSON object", "bomb", "no known format"]
    for bad, problem in zip(report.bad_samples, problems):
        assert problem in bad.message and bad.message.startswith(bad.field) and bad.message.endswith(".")
    assert report.formats == {"mirage": 1, "monet": 1}
    assert report.spans_per_sample == {1: 1, 2: 1}
    mirage = len("Here is  Plan" + "Right \\boxed{\\text{R}}")
    monet = 2 * len("Think.PlanRight Up \\boxed{R}")
    assert report.characters == {"min": mirage, "median": mirage, "max": monet}
    assert report.num_images == 6 and report.image_sizes == dict.fromkeys(("min", "median", "max"), (32, 32))
    assert report.tokens == {}


def test_medians_are_exact(image_root):
    for size in (16, 48, 64, 24):
        make_image("red", size).save(image_root / f"{size}.png")
    PILImage.new("RGB", (200, 1)).save(image_root / "flat.png")
    rows = [
        {**NATIVE, "images": [f"{size}.png", f"{size}.png"], "messages": [*NATIVE["messages"][:2]]}
        for size in (16, 48, 64)
    ] + [{**MIRAGE, "image_input": "flat.png", "image_output": "24.png"}]
    report = check_dataset(write_jsonl(image_root / "rows.jsonl", rows), show_progress=False)
    # Areas: 200, 2 x 256, 576, 2 x 2304, 2 x 4096; of eight the fourth is the (lower) median.
    assert report.image_sizes == {"min": (200, 1), "median": (24, 24), "max": (64, 64)}
    assert report.is_good and report.spans_per_sample == {1: 4}


def test_decoding_finds_what_the_header_does_not_show(image_root):
    data = (image_root / "board.png").read_bytes()
    (image_root / "board.png").write_bytes(data[:-30])
    path = write_jsonl(image_root / "rows.jsonl", [REFERENCE])
    assert check_dataset(path, show_progress=False).is_good
    (bad,) = check_dataset(path, decode_images=True, show_progress=False).bad_samples
    assert (bad.number, bad.field) == (1, "image_input[0]") and "no image that can be read" in bad.message


def test_tokens_are_those_of_the_trainer(image_root, processor):
    make_image("red", 96).save(image_root / "wide.png")
    wide = {**REFERENCE, "image_input": ["wide.png", "board.png"]}
    text_only = {"messages": [{"role": "user", "content": "Plan"}, {"role": "assistant", "content": "Right"}]}
    for row in [*ROWS.values(), wide, text_only]:
        path = write_jsonl(image_root / "rows.jsonl", [row])
        (prepared,) = prepare_dataset(load_conversations(path), processor, stage=2)
        report = check_dataset(path, processor=processor, show_progress=False)
        assert report.tokens == dict.fromkeys(("min", "median", "max"), prepared["length"])
    path = write_jsonl(image_root / "rows.jsonl", [wide, MIRAGE])
    lengths = check_dataset(path, processor=processor, show_progress=False).tokens
    report = check_dataset(path, processor=processor, max_length=lengths["max"] - 1, show_progress=False)
    (bad,) = report.bad_samples
    assert bad.number == 1 and f"has {lengths['max']} tokens, more than max_length={lengths['max'] - 1}" in bad.message
    with pytest.raises(ValueError, match="max_length=5 is in tokens, and needs a processor"):
        check_dataset(path, max_length=5)


def test_data_set_folder(tmp_path):
    samples = [make_sample(["Right", "Up"]), make_sample(["Right"])]
    samples[1]["images"] = []
    Dataset.from_list(samples).cast_column("images", List(Image())).save_to_disk(tmp_path / "saved")
    report = check_dataset(str(tmp_path / "saved"), show_progress=False)
    assert report.num_samples == 2 and [bad.number for bad in report.bad_samples] == [1]
    assert f"{report.path}:sample 1: messages[0]" in str(report)


def test_memory_is_bounded(image_root):
    path = image_root / "rows.jsonl"
    text = {"messages": [{"role": "user", "content": "x" * 20_000}, {"role": "assistant", "content": "y"}]}
    with open(path, "w") as file:
        file.writelines([json.dumps(text) + "\n"] * 1000)
    tracemalloc.start()
    assert check_dataset(str(path), show_progress=False).num_good == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < path.stat().st_size / 5


# The command.


def test_command(mixed, tmp_path, capsys):
    assert main(["check-data", mixed, "--output", str(tmp_path / "report.json")]) == 1
    shown = capsys.readouterr()
    assert f"{mixed}:line 3: line: is no JSON" in shown.out
    assert "samples           9: 3 good, 6 bad" in shown.out
    assert "spans per sample  2 with 1, 1 with 2" in shown.out
    assert "rows.jsonl: 100%" in shown.err  # the progress bar
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["num_samples"], report["num_good"], report["num_bad"]) == (9, 3, 6)
    assert report["bad_samples"][0]["number"] == 3 and report["image_sizes"]["max"] == [640, 640]
    assert main(["check-data", mixed, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == report


def test_exit_status(image_root, backbone_dir, processor, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [MIRAGE])
    arguments = ["check-data", rows, "--image_root", str(image_root), "--format", "mirage", "--decode_images"]
    assert main(arguments) == 0
    processor.save_pretrained(tmp_path / "processor")
    assert main([*arguments, "--processor", str(backbone_dir)]) == 0
    assert "tokens            min" in capsys.readouterr().out
    assert main([*arguments, "--processor", str(backbone_dir), "--max_length", "3"]) == 1
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["check-data", str(tmp_path / "empty.jsonl")]) == 1
    capsys.readouterr()
    assert main(["check-data", "nowhere.jsonl"]) == 2
    assert capsys.readouterr().err == "ilvr check-data: There is no file nowhere.jsonl. Correct the path.\n"


def test_equal_errors_are_one_line(image_root, capsys):
    path = write_jsonl(image_root / "rows.jsonl", [MIRAGE, {"a": 1}, {"b": 1}, *[{"a": 1}] * 3])
    assert main(["check-data", path]) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}: 4 lines, first at line 2: row: the fields ['a'] fit no known format")
    assert "--format" in first and "format=" not in first
    assert second.startswith(f"{path}:line 3: row: the fields ['b']")


def test_arguments_are_looked_at_before_the_data(image_root, tmp_path, capsys):
    path = write_jsonl(image_root / "rows.jsonl", [MIRAGE])
    for arguments, message in (
        (["--formt", "native"], "unknown arguments: --formt"),
        (["--tokenizer", "x"], "unknown arguments: --tokenizer"),
        (["--output", str(tmp_path / "none" / "x.json")], "--output: there is no folder"),
    ):
        assert main(["check-data", path, *arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and len(shown.err.splitlines()) == 1 and message in shown.err


def test_an_interrupt_is_no_traceback(image_root, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ilvr_commands.check_data.check_dataset", interrupt)
    assert main(["check-data", write_jsonl(image_root / "rows.jsonl", [MIRAGE])]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_page_about_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.S | re.M)
    (_, row), (_, code), (_, command), (_, output), _ = blocks
    exec(code, {})
    assert "'role': 'assistant'" in capsys.readouterr().out
    assert main(command.split()[1:]) == 0
    assert capsys.readouterr().out == output
    sample, shown = load_conversations("rows.jsonl")[0], json.loads(row)
    path = write_jsonl(tmp_path / "native.jsonl", [shown])
    assert load_conversations(path)[0] == sample
