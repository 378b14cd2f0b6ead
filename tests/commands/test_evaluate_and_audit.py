"""`ilvr evaluate` and `ilvr audit`: what they print and write, and what they refuse in one line."""

import json

import pytest
from helpers import NATIVE, make_image, write_jsonl

from ilvr_commands.main import main


SHIFTS = ["--task", "shifts", "--task_settings", '{"boards": 1, "test_boards": 5, "lengths": [2, 3]}']
FEW = ["--max_new_tokens", "4", "--batch_size", "2"]


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_evaluate(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["evaluate", checkpoint, *SHIFTS, *FEW, "--output", str(out), "--control_samples", "3"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert (
        "| questions | n | accuracy | invalid |" in shown and "| Shifts | 5 | 0.0 % (0.0 – 43.4) | 100.0 % |" in shown
    )
    assert "| another sample's | 3 | 0.0 % (0.0 – 56.1) | 0.0 (0.0 to 0.0) | 1 |" in shown
    results = json.loads((out / "results.json").read_text())
    assert list(results["controls"]) == ["own", "another_sample", "zeros"] and results["unfinished"] == 1
    assert len((out / "own.jsonl").read_text().splitlines()) == 6
    assert len((out / "controls" / "zeros.jsonl").read_text().splitlines()) == 4
    assert main([*command, "--json", "--controls", "none"]) == 0
    assert "controls" not in json.loads(capsys.readouterr().out)


def test_evaluate_groups_and_both_rules(checkpoint, tmp_path, capsys):
    rows = [{"text_input": "Plan", "image_input": "board.png", "map_desc": [[1, 0], [-1, 2]]}]
    make_image("gray").save(tmp_path / "board.png")
    path = write_jsonl(tmp_path / "test_direct.jsonl", rows * 3)
    assert (
        main(["evaluate", checkpoint, "--dataset", path, *FEW, "--output", str(tmp_path / "o"), "--controls", "none"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "| questions | n | end_on_goal | first_hit | invalid |" in shown
    assert "| 2x2 | 3 | 0.0 % (0.0 – 56.1) | 0.0 % | 100.0 % |" in shown


def test_audit(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["audit", checkpoint, *SHIFTS, *FEW, "--output", str(out), "--pictured", "1"]
    assert main([*command, "--controls", "another_sample,zeros"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{checkpoint}: none\n  The model answers 0.0 %") and "audit.html" in shown.err
    assert list(json.loads((out / "audit.json").read_text())["models"][0]["controls"]) == ["another_sample", "zeros"]
    assert (out / "audit.html").stat().st_size > 10_000


def test_one_line_for_what_is_wrong(checkpoint, backbone_dir, image_root, tmp_path, capsys):
    rows = write_jsonl(image_root / "rows.jsonl", [{**NATIVE, "answer": None}])
    out = ["--output", str(tmp_path / "out")]
    for arguments, message in (
        ([checkpoint, *out], "either --task or --dataset"),
        ([checkpoint, *SHIFTS, "--dataset", rows, *out], "either --task or --dataset"),
        ([checkpoint, *SHIFTS], "are required: --output"),
        ([checkpoint, *SHIFTS, *out, "--formt", "x"], "unknown arguments: --formt"),
        ([checkpoint, *SHIFTS, *out, "--controls", "ones"], "no control 'ones'"),
        ([checkpoint, *SHIFTS, *out, "--metric", "frozen_lake"], "has its own, boxed_exact_match"),
        ([checkpoint, "--task", "chess", *out], "no task 'chess'"),
        ([checkpoint, "--task", "shifts", *out], "--task_settings: "),
        ([checkpoint, "--task", "shifts", "--task_settings", "{", *out], "--task_settings: is no JSON"),
        ([checkpoint, "--task", "shifts", "--task_settings", "[]", *out], "--task_settings: must be an object"),
        ([checkpoint, "--dataset", rows, *out], "answer: sample 0 of rows has none"),
        ([checkpoint, "--dataset", "none.jsonl", *out], "There is no file none.jsonl"),
        ([str(backbone_dir), *SHIFTS, *out], "plain qwen2_5_vl backbone"),
        ([str(tmp_path / "nowhere"), *SHIFTS, *out], "nowhere"),
    ):
        for command in ("evaluate", "audit"):
            assert main([command, *arguments]) == 2, arguments
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ilvr ")]
            assert len(lines) == 1 and message in lines[0], (arguments, lines)
    assert main(["evaluate", checkpoint, *SHIFTS, *out, "--controls", "oracle"]) == 2
    assert "run by `ilvr audit`" in capsys.readouterr().err
    for option, message in (
        (["--helper_question", "Where?"], "asked by a --selection_method"),
        (["--selection_method", "guess"], "`selection_method` must be one of"),
    ):
        assert main(["audit", checkpoint, *SHIFTS, *out, *option]) == 2
        assert message in capsys.readouterr().err
