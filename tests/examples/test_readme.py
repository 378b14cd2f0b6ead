"""The README's code, on a tiny backbone and data of its own: from a file to a score, and the latents."""

import json
import re

import pytest
from helpers import make_image
from pages import REPOSITORY, blocks

from ilvr import trainer as trainers


PAGES = ["README.md", *(path.relative_to(REPOSITORY).as_posix() for path in sorted(REPOSITORY.glob("docs/**/*.md")))]
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
    codes = [block.code for block in blocks("README.md") if block.language == "python"]
    names = {}
    for code in codes:
        if "runs/shifts_small" not in code:  # what `make train` leaves
            code = code.replace("Qwen/Qwen2.5-VL-7B-Instruct", str(backbone_dir))
            exec(compile(code, "README.md", "exec"), names)
    assert len(codes) == 3 and "accuracy" in capsys.readouterr().out
    assert (tmp_path / "stage1" / "adapter_config.json").exists() and (tmp_path / "stage2" / "config.json").exists()
    (latents,) = names["output"].latents
    assert latents.shape[1:] == (8, 32)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = REPOSITORY / page
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
