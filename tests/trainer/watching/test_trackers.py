"""TensorBoard and Trackio."""

import sqlite3
import sys

import pytest
from helpers import ALIGNMENT, PARTS, SELECTION, SPEED, run_with_pictures
from PIL import Image


def test_tensorboard(model, processor, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = run_with_pictures(model, processor, tmp_path, max_steps=2, report_to="tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents.*")  # the callback opens none of its own
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    tags = events.Tags()
    metrics = PARTS | SPEED | ALIGNMENT | SELECTION
    assert {f"train/{name}" for name in metrics} <= set(tags["scalars"])
    for name in ("selected_2", "alignment_loss", "tokens_per_second"):
        logged = [log[name] for log in trainer.state.log_history if name in log]
        assert [event.value for event in events.Scalars(f"train/{name}")] == pytest.approx(logged)
    (image,) = events.Images("selections")
    png = Image.open(tmp_path / "selections" / "step-000002.png")
    assert image.step == 2 and (image.width, image.height) == png.size
    histogram = events.Histograms("train/selected")[-1].histogram_value
    logged = [trainer.state.log_history[1][f"selected_{k}"] for k in (1, 2, 3)]
    assert histogram.bucket == pytest.approx(logged) and histogram.bucket_limit == [1.5, 2.5, 3.5]


def test_trackio(model, processor, tmp_path, monkeypatch):
    """Offline: a database and the picture in a folder, which `trackio` reads from the environment when imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    settings = {"report_to": "trackio", "project": "watching", "run_name": "tiny", "max_steps": 2}
    trainer = run_with_pictures(model, processor, tmp_path / "out", **settings)
    with sqlite3.connect(tmp_path / "trackio" / "watching.db") as database:
        rows = [row for (row,) in database.execute("select metrics from metrics order by id")]
    text = "\n".join(row if isinstance(row, str) else row.decode() for row in rows)
    for name in PARTS | SPEED | ALIGNMENT | SELECTION:
        assert f'"train/{name}"' in text, name
    assert "trackio.histogram" in text and "trackio.image" in text
    (png,) = (tmp_path / "trackio" / "media").rglob("*.png")
    assert Image.open(png).size == Image.open(trainer.args.output_dir + "/selections/step-000002.png").size
