"""The notebook runs from its first cell to its last, on a tiny random model, and is kept without outputs."""

import copy

import nbformat
from nbclient import NotebookClient
from pages import REPOSITORY


NOTEBOOK = REPOSITORY / "examples" / "look_into_latents.ipynb"


def test_look_into_latents(model, processor, tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in codes)
    (settings,) = [cell for cell in codes if "parameters" in cell.metadata.get("tags", [])]
    settings.source = f"CHECKPOINT, FEW, MAX_NEW_TOKENS = {str(tmp_path)!r}, 4, 16"
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.sequence_bias = [[[processor.latent_token_ids[0]], 6.0]]  # a random model with spans
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in codes]
    asked, answered, _, replaced, counted = printed[1:]
    assert "shift" in asked.lower() and answered.count("spans of 3 x 32") == 2
    assert [line.split("  ")[0] for line in replaced.splitlines()][:4] == [
        *("its own", "of the second answer", "noise of its norm", "zeros"),
    ]
    assert "another_sample" in counted and found_word(counted) in ("none", "used", "sensitive", "idle", "open")
    pictures = [
        output.data["image/png"] for cell in codes for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2 and all(len(picture) > 1000 for picture in pictures)


def found_word(printed: str) -> str:
    return printed.strip().splitlines()[-1].split(":")[0]
