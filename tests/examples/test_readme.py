"""The README's code, on a tiny backbone and data of its own: from a file to a score, and the latents."""

import json
import re
from pathlib import Path

import pytest
from helpers import make_image

from ilvr import trainer as trainers


README = Path(__file__).parents[2] / "README.md"
ONE_STEP = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


def test_from_own_data_to_a_score(backbone_dir, tmp_path, monkeypatch, capsys):
    """Each block in turn, as it stands but for the backbone's name; a config of one step on a CPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("board", "step"):
        make_image("red").save(tmp_path / "images" / f"{name}.png")
    image = {"type": "image"}
    answer = [{"type": "text", "text": "Right"}, image, {"type": "text", "text": "\\boxed{R}"}]
    question = [image, {"type": "text", "text": "Plan a path"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = json.dumps({"messages": turns, "images": ["board.png", "step.png"], "answer": "R"})
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n" * 2)

    config = trainers.ILVRTrainingConfig
    monkeypatch.setattr(trainers, "ILVRTrainingConfig", lambda *args, **kwargs: config(*args, **ONE_STEP, **kwargs))
    text = README.read_text().replace("Qwen/Qwen2.5-VL-7B-Instruct", str(backbone_dir))
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    names = {}
    for block in blocks:
        if "runs/shifts_small" not in block:  # what `make train` leaves
            exec(compile(block, str(README), "exec"), names)
    assert len(blocks) == 3 and "accuracy" in capsys.readouterr().out
    assert (tmp_path / "stage1" / "adapter_config.json").exists() and (tmp_path / "stage2" / "config.json").exists()
    (latents,) = names["output"].latents
    assert latents.shape[1:] == (8, 32)


@pytest.mark.parametrize("page", ["README.md", *sorted(p.name for p in (README.parent / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    path = README if page == "README.md" else README.parent / "docs" / page
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
