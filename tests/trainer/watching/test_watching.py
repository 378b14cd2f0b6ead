"""What a run shows of itself: metrics, pictures, TensorBoard, Trackio; and that all its settings are read."""

import copy
import dataclasses
import json
import re
import sqlite3
import sys

import pytest
import torch
from helpers import SAMPLES, make_dataset, make_sample, make_trainer
from PIL import Image
from transformers import TrainerCallback
from trl import SFTConfig

from ilvr.trainer import ILVRTrainer, ILVRTrainingConfig, SelectionDrawingCallback
from ilvr.trainer.inputs.data_preparation import prepare_dataset
from ilvr.trainer.selection import Selection
from ilvr.trainer.watching.clock import StepClock, peak_gpu_memory
from ilvr.trainer.watching.selection_drawing import compare_latents
from ilvr.trainer.watching.selection_pictures import (
    STUDENT_COLOR,
    TEACHER_COLOR,
    candidate_boxes,
    outline,
    selection_row,
    sheet,
    token_grid,
)
from ilvr.trainer.watching.step_log import StepLog


UNEQUAL = [make_sample(words, "Plan") for words in (["Up"] * 2, ["Up"] * 4, ["Up"] * 3, ["Left Down"])]
PARTS = {"loss", "ce_loss", "entropy", "mean_token_accuracy", "spans_per_sample", "num_tokens", "grad_norm"}
SPEED = {"step_time", "tokens_per_second"}
ALIGNMENT = {"alignment_loss", "latent_cosine", "teacher_distance", "target_similarity"}
SELECTION = {"selected_per_span", "selected_mass", "selected_1", "selected_2", "selected_3"}


def make_selection() -> Selection:
    """Spans with K* = 2 and 1 in the first sample, K* = 2 in the second, whose second span does not exist."""
    candidates = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]).expand(2, 2, 3, 2)
    candidate_mask = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [0, 0, 0]]], dtype=torch.bool)
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [0, 0]]], dtype=torch.bool)
    indices = torch.tensor([[[2, 0], [1, 0]], [[0, 1], [0, 0]]])
    targets = candidates.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, 2)) * mask.unsqueeze(-1)
    mass = torch.tensor([[0.5, 0.9], [1.0, 0.0]])
    return Selection(targets, mask, indices, mass, candidates, candidate_mask)


# -------------------------------------------------------------------------------------------------- the metrics


def test_statistics_of_a_selection_by_hand():
    found = {name: value.item() for name, value in make_selection().statistics().items()}
    expected = {"selected_per_span": 5 / 3, "selected_mass": 0.8, "selected_1": 1 / 3, "selected_2": 2 / 3}
    assert found == pytest.approx(expected)


def test_nearest_candidate_by_hand():
    """By cosine: neither a longer candidate nor one that does not exist wins."""
    latents = torch.tensor([[[3.0, 1.0], [-9.0, 1.0]]]).expand(2, 2, 2, 2)
    selection = make_selection()
    nearest = selection.nearest(latents)
    assert nearest[0].tolist() == [[0, 2], [0, 1]] and nearest[1, 0].tolist() == [0, 2]
    selection.candidates = selection.candidates * torch.tensor([1.0, 9.0, 1.0]).view(3, 1)
    assert selection.nearest(latents).equal(nearest)


@pytest.mark.parametrize("training", [True, False])
def test_recorded_means_are_weighted_and_skip_nothings(model, processor, tmp_path, training):
    trainer = make_trainer(model, processor, tmp_path, max_steps=1)
    model.train(training)
    trainer.record(1, a=4.0)
    trainer.record(3, a=torch.tensor(8.0), b=1.0)
    trainer.record(torch.tensor(0), a=torch.tensor(torch.nan), c=torch.tensor(torch.nan))
    trainer.record_tokens(5)
    trainer.record_tokens(torch.tensor(6))
    trainer.log(logs := {})
    prefix = "" if training else "eval_"
    assert logs[f"{prefix}a"] == 7 and logs[f"{prefix}b"] == 1 and f"{prefix}c" not in logs
    assert logs.get("num_tokens") == (11 if training else None)
    trainer.log(again := {})
    assert not again.keys() & {f"{prefix}a", f"{prefix}b"}


def test_ranks_with_other_names_and_numbers_of_values(monkeypatch):
    class Accelerator:
        num_processes = 2

        device = torch.device("cpu")

    other = {"sums": {"a": [10.0, 5.0], "only_there": [2.0, 1.0]}, "totals": {"tokens": 7.0}}
    monkeypatch.setattr("ilvr.trainer.watching.step_log.gather_object", lambda mine: [*mine, other])
    log = StepLog(Accelerator())
    log.add_means(2, a=1.0, only_here=3.0)
    log.add_means(1, a=2.0)
    log.add_totals(tokens=4)
    resumed = StepLog(Accelerator())
    resumed.load_state_dict(json.loads(json.dumps(log.state_dict())))
    for counted in (log, resumed):
        means, totals = counted.read()
        assert means == {"a": 14 / 8, "only_here": 3, "only_there": 2} and totals == {"tokens": 11}
        assert counted.read() == ({"a": 2, "only_there": 2}, {"tokens": 7})  # this rank has counted nothing since


def test_clock_counts_steps_and_not_what_lies_between(monkeypatch):
    now = iter([0.0, 2.0, 100.0, 104.0])  # start and end of two steps, with a long evaluation in between
    monkeypatch.setattr("ilvr.trainer.watching.clock.time.perf_counter", lambda: next(now))
    clock = StepClock()
    for _ in range(2):
        clock.start()
        clock.on_step_end(None, None, None)
    assert clock.read(60) == {"step_time": 3.0, "tokens_per_second": 10.0}
    assert clock.read(0) == {}


def test_gpu_memory_is_the_peak_since_the_last_log(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    assert peak_gpu_memory(torch.device("cuda")) == {"gpu_memory_gib": 1.5} and len(resets) == 1
    assert peak_gpu_memory(torch.device("cpu")) == {} and len(resets) == 1


@pytest.mark.gpu
def test_gpu_memory_is_logged(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, max_steps=1, use_cpu=False)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["gpu_memory_gib"] < 2


@pytest.mark.parametrize("stage", [1, 2])
def test_log_is_complete_and_the_same_under_accumulation(model, processor, tmp_path, stage):
    """Samples of 1, 3, 2 and 0 spans, in one batch and one by one: means over spans and words, not over batches."""
    logs = []
    for size in (4, 1):
        settings = {"stage": stage, "max_steps": 1, "per_device_train_batch_size": size}
        settings |= {"gradient_accumulation_steps": 4 // size, "selection_temperature": 0.3}
        trainer = make_trainer(copy.deepcopy(model), processor, tmp_path, UNEQUAL, **settings)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    expected = PARTS | SPEED | (ALIGNMENT | SELECTION if stage == 1 else set())
    for log in logs:
        assert expected <= log.keys() and "gpu_memory_gib" not in log
        assert not (stage == 2 and log.keys() & (ALIGNMENT | SELECTION))
        assert log["spans_per_sample"] == 1.5
        assert log["num_tokens"] == sum(trainer.train_dataset["length"])
        assert log["tokens_per_second"] == pytest.approx(log["num_tokens"] / log["step_time"])
        if stage == 1:
            shares = [log[f"selected_{k}"] for k in (1, 2, 3)]
            assert sum(shares) == pytest.approx(1)
            assert sum(k * share for k, share in enumerate(shares, 1)) == pytest.approx(log["selected_per_span"])
            assert log["loss"] == pytest.approx(log["ce_loss"] + log["alignment_loss"], rel=1e-4)
    # The spread of targets is taken within a batch, and distances of teachers come after steps of Adam.
    for name in expected - SPEED - {"target_similarity", "teacher_distance"}:
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-3), name


def test_evaluation_in_between_leaves_the_window_alone(model, processor, tmp_path):
    """Steps 1 to 4 are logged together, with evaluations after 2 and 4; without them, the log is the same."""

    class EvaluateCallback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = state.global_step in (2, 4)

    logs = []
    for callbacks in (None, [EvaluateCallback()]):
        settings = {"max_steps": 4, "logging_steps": 4, "per_device_eval_batch_size": 2, "callbacks": callbacks}
        trainer = make_trainer(copy.deepcopy(model), processor, tmp_path, **settings)
        trainer.eval_dataset = prepare_dataset(make_dataset(SAMPLES[:3]), processor, stage=1)
        trainer.train()
        logs.append(next(log for log in trainer.state.log_history if "loss" in log))
    assert logs[0].keys() == logs[1].keys()
    for name in logs[0].keys() - SPEED:
        assert logs[0][name] == logs[1][name], name
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 2 and all({"eval_ce_loss", "eval_selected_1"} <= log.keys() for log in evaluations)


def test_resumed_runs_go_on_with_their_sums(model, processor, tmp_path):
    """The line of step 4, from a checkpoint of step 3: tokens and time of steps 3 and 4."""
    other = copy.deepcopy(model)
    settings = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(model, processor, tmp_path, **settings)
    whole.train()
    resumed = make_trainer(other, processor, tmp_path, **settings)
    steps = []
    read, resumed.clock.read = resumed.clock.read, lambda tokens: steps.append(resumed.clock.steps) or read(tokens)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert steps == [2, 0]  # at the line of step 4, and at the end
    expected, found = whole.state.log_history[1], resumed.state.log_history[1]
    assert found["num_tokens"] == 2 * sum(whole.train_dataset["length"])  # four steps of four of eight samples
    assert all(found[name] == expected[name] for name in expected.keys() - SPEED) and found.keys() >= SPEED


# -------------------------------------------------------------------------------------------------- the pictures


def test_grids():
    assert token_grid(6, (96, 64), [1, 4, 6]) == (2, 3)  # 4 x 6 patches, merged by twos
    assert token_grid(6, (96, 64)) == (2, 3) and token_grid(6, (64, 96)) == (3, 2) and token_grid(4, (9, 9)) == (2, 2)


def test_boxes_follow_the_groups():
    """Six cells in 2 x 3 in four groups: two of two cells, the second of which goes round the corner."""
    assert torch.arange(6).tensor_split(4)[1].tolist() == [2, 3]
    assert candidate_boxes(0, 4, (2, 3)) == [(0, 0, 1, 2)]
    assert candidate_boxes(1, 4, (2, 3)) == [(0, 2, 1, 3), (1, 0, 2, 1)]
    assert candidate_boxes(2, 4, (2, 3)) == [(1, 1, 2, 2)] and candidate_boxes(3, 4, (2, 3)) == [(1, 2, 2, 3)]
    assert candidate_boxes(4, 6, (2, 3)) == [(1, 1, 2, 2)]


def outlined(image: Image.Image, grid, color) -> list[int]:
    """Numbers, in raster order, of the cells with a frame all around."""
    rows, columns = grid
    height, width = image.height / rows, image.width / columns
    found = []
    for cell in range(rows * columns):
        left, top = cell % columns * width, cell // columns * height
        x, y = left + width / 2, top + height / 2
        points = [(x, top + 1), (x, top + height - 2), (left + 1, y), (left + width - 2, y)]
        if all(image.getpixel((int(a), int(b))) == color for a, b in points):
            found.append(cell)
    return found


def test_outlines_are_around_the_cells():
    image = Image.new("RGB", (30, 30), "white")
    panels = selection_row(image, (3, 3), 9, [4, 0], [8, 8])
    assert [panel.size for panel in panels] == [(256, 256)] * 3
    assert outlined(panels[0], (3, 3), TEACHER_COLOR) == [] == outlined(panels[0], (3, 3), STUDENT_COLOR)
    assert outlined(panels[1], (3, 3), TEACHER_COLOR) == [0, 4]
    assert outlined(panels[2], (3, 3), STUDENT_COLOR) == [8]
    assert image.getpixel((0, 0)) == (255, 255, 255)  # the image itself is not drawn on
    tiny = outline(Image.new("RGB", (40, 40), "white"), (4, 4), 16, [5], TEACHER_COLOR)
    assert tiny.getpixel((15, 15)) == (255, 255, 255)  # no number where it would hide the cell
    picture = sheet([("a", panels), ("b", panels)], ["x", "y", "z"])
    assert picture.crop((272, 44, 528, 300)).tobytes() == panels[1].tobytes()


def run_with_pictures(model, processor, folder, every=2, **settings):
    trainer = make_trainer(model, processor, folder, **settings)
    if every:
        trainer.add_callback(SelectionDrawingCallback(trainer, make_dataset(SAMPLES[1:3]), every=every))
    trainer.train()
    return trainer


@pytest.mark.parametrize("settings", [{}, {"cache_images": True}, {"selection_method": "random"}], ids=str)
def test_pictures_do_not_disturb_training(model, processor, tmp_path, settings):
    """Noise on the targets and dropout draw random numbers in each step; all that is logged stays the same."""
    settings = {"alignment_noise": 0.1, "max_steps": 3, **settings}
    for layer in model.vlm.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    other = copy.deepcopy(model)
    plain = run_with_pictures(model, processor, tmp_path / "a", every=0, **settings).state.log_history
    drawn = run_with_pictures(other, processor, tmp_path / "b", every=1, **settings).state.log_history
    for a, b in zip(plain[:3], drawn[:3], strict=True):
        assert a.keys() == b.keys() and all(a[name] == b[name] for name in a.keys() - SPEED)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    names = [f"step-00000{n}.png" for n in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "b" / "selections").iterdir()) == names


@pytest.mark.parametrize("max_candidates", [256, 3])
def test_picture_shows_what_was_selected(model, processor, tmp_path, max_candidates):
    """The outlines in the saved file against the selection itself; boards of 2 x 2 cells, single or grouped."""
    settings = {"max_steps": 2, "cache_images": True, "max_candidates": max_candidates}
    trainer = run_with_pictures(model, processor, tmp_path, **settings)
    assert [path.name for path in (tmp_path / "selections").iterdir()] == ["step-000002.png"]
    picture = Image.open(tmp_path / "selections" / "step-000002.png")
    callback = trainer.callback_handler.callbacks[-1]
    selection, latents = compare_latents(trainer, callback.batch)
    nearest = selection.nearest(latents)
    spans = selection.mask.any(-1).nonzero().tolist()
    assert spans == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]  # samples with two and with three spans
    cells = [range(4)] if max_candidates == 256 else [[0, 1], [2], [3]]
    cells = [[n] for n in range(4)] if max_candidates == 256 else cells
    for row, (b, s) in enumerate(spans):
        top = 18 + 8 + row * (18 + 256 + 8) + 18
        mask = selection.mask[b, s]
        for column, chosen, color in ((1, selection.indices, TEACHER_COLOR), (2, nearest, STUDENT_COLOR)):
            left = 8 + column * (256 + 8)
            panel = picture.crop((left, top, left + 256, top + 256))
            expected = {cell for n in chosen[b, s, mask].tolist() for cell in cells[n]}
            if max_candidates == 256:
                assert set(outlined(panel, (2, 2), color)) == expected
            else:  # cells of a group have a frame around both: its upper edge is above each of them
                above = {n for n in range(4) if panel.getpixel((64 + 128 * (n % 2), 128 * (n // 2) + 1)) == color}
                assert above == expected


@pytest.mark.parametrize("settings", [{"stage": 2}, {"selection_method": "mean_pool"}], ids=str)
def test_nothing_to_draw_is_refused(model, processor, tmp_path, settings):
    trainer = make_trainer(model, processor, tmp_path, **settings)
    with pytest.raises(ValueError, match="selection_method"):
        SelectionDrawingCallback(trainer, make_dataset(SAMPLES[:1]))


@pytest.mark.parametrize("backbone_name", ["gemma3"], indirect=True)
def test_backbones_without_a_grid_are_drawn_by_the_shape_of_the_image(model, processor, tmp_path):
    run_with_pictures(model, processor, tmp_path, max_steps=1, every=1)
    assert (tmp_path / "selections" / "step-000001.png").exists()


@pytest.mark.parametrize("backbone_name", ["smolvlm"], indirect=True)
def test_tiles_are_refused(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path)
    with pytest.raises(ValueError, match="cuts the 1 helper images into 5 tiles"):
        SelectionDrawingCallback(trainer, make_dataset([make_sample(["Up", "Down"], size=64)]))


def test_arguments_of_the_callback_are_checked(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, cache_images=True)
    with pytest.raises(ValueError, match="`every` must be at least 1 optimizer step, got 0"):
        SelectionDrawingCallback(trainer, make_dataset(SAMPLES[:1]), every=0)
    with pytest.raises(ValueError, match="features, not images"):
        SelectionDrawingCallback(trainer, trainer.train_dataset.select([0]))


# --------------------------------------------------------------------------------------------- TensorBoard and Trackio


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


# -------------------------------------------------------------------------------------------------- the config


def added_fields(config_class) -> set[str]:
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    return {field.name for field in dataclasses.fields(config_class)} - inherited


def unread_fields(config_class, model, processor, folder) -> set[str]:
    """Fields added to TRL's that no run of the trainer reads: preparation, both stages, two kinds of selection.

    Only what the trainer's package reads counts, and not the config's own checks: `transformers` prints and saves all.
    """
    unread = added_fields(config_class)

    class Recording(config_class):
        def __getattribute__(self, name):
            reader = sys._getframe(1).f_globals["__name__"]
            if reader.startswith("ilvr.trainer.") and reader != ILVRTrainingConfig.__module__:
                unread.discard(name)
            return super().__getattribute__(name)

    common = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "bf16": False}
    common |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    for settings in ({"stage": 1}, {"stage": 2}, {"stage": 1, "selection_method": "uniform"}):
        args = Recording(str(folder), **common, **settings)
        dataset = make_dataset(SAMPLES[:2])
        ILVRTrainer(copy.deepcopy(model), args, train_dataset=dataset, processing_class=processor).train()
    return unread


def test_every_field_of_the_config_is_read(model, processor, tmp_path):
    @dataclasses.dataclass
    class WithUnread(ILVRTrainingConfig):
        nobody_reads_this: int = 1

    assert {"stage", "selection_temperature", "alignment_noise"} <= added_fields(ILVRTrainingConfig)
    assert unread_fields(WithUnread, model, processor, tmp_path) == {"nobody_reads_this"}


def test_defaults_in_the_docstring_are_the_defaults():
    defaults = {field.name: field.default for field in dataclasses.fields(ILVRTrainingConfig)}
    documented = re.findall(r"(\w+) \(`[^)]*\*optional\*, defaults to `?([^`)]+)`?\)", ILVRTrainingConfig.__doc__)
    assert {name for name, _ in documented} == added_fields(ILVRTrainingConfig)
    note = ILVRTrainingConfig.__doc__.split("[!NOTE]")[1].replace("\n    >", "")
    documented += re.findall(r"`(\w+)` `?(True|False|None|\d[\d.e-]*)", note.split(": ", 1)[1])
    assert {"learning_rate", "max_length", "remove_unused_columns"} <= {name for name, _ in documented}
    for name, value in documented:
        found = defaults[name]
        assert value.strip('"') == str(found) or float(value) == found, name
