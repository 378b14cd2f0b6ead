"""The benchmark compares work, not results: the published algorithm has our targets, loss and gradients."""

import copy
import gc
import json

import numpy as np
import pytest
import torch
from helpers import make_sample, make_trainer
from PIL import Image

from benchmarks import selection
from benchmarks.measure import alternate, peak_memory, ratio
from benchmarks.model import whole_teacher
from benchmarks.reference import reference_stage1_step, reference_stage2_step
from ilvr.tasks import load_task
from ilvr.trainer.target_selection import TargetSelector


NOISE = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)  # candidates that differ
SAMPLE = make_sample(["Right", "Down Up", "Up", "Left"], "Plan a path") | {"images": [*map(Image.fromarray, NOISE)]}
SELECTION = {"top_p": 0.9, "temperature": 0.05}


def start(model, processor, folder, stage):
    """A trainer and its batch of one sample; stage 1's teacher has moved away from the student."""
    trainer = make_trainer(
        model,
        processor,
        folder,
        [SAMPLE],
        stage=stage,
        per_device_train_batch_size=1,
        unselected_slots="pad",
        **{f"selection_{name}": value for name, value in SELECTION.items()},
    )
    if stage == 1:
        with torch.no_grad():
            for parameter in trainer.teacher.model.vlm.model.language_model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return trainer, trainer.data_collator([trainer.train_dataset[0]])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max() / other[k].abs().max().clamp(min=1e-6)) for k in one)


def test_stage_1_has_the_targets_loss_and_gradients_of_the_published_algorithm(model, processor, tmp_path):
    plain = copy.deepcopy(model)
    trainer, batch = start(model, processor, tmp_path, stage=1)
    fed = []
    model.model.register_forward_hook(lambda _, __, outputs: fed.append(outputs.latent_inputs))
    loss = trainer.compute_loss(model, dict(batch))
    found = gradients(model, loss)

    plain.model.vlm.model.visual.requires_grad_(False)
    expected, targets = reference_stage1_step(plain, whole_teacher(trainer), batch, **SELECTION)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert largest_difference(found, gradients(plain, expected)) < 1e-4
    assert len(targets) == 3 and len({len(chosen) for chosen in targets}) > 1  # top-p binds in some spans
    for span, chosen in enumerate(targets):
        torch.testing.assert_close(fed[0][0, span, : len(chosen)].detach(), chosen, rtol=1e-4, atol=1e-5)

    # The control: another teacher selects other targets.
    other, others = reference_stage1_step(plain, plain, batch, **SELECTION)
    assert abs(other.item() - loss.item()) > 1e-3
    assert any(a.shape != b.shape or not a.allclose(b) for a, b in zip(targets, others))


def test_stage_2_has_the_loss_and_gradients_of_the_published_algorithm(model, processor, tmp_path):
    plain = copy.deepcopy(model)
    trainer, batch = start(model, processor, tmp_path, stage=2)
    loss = trainer.compute_loss(model, dict(batch))
    found = gradients(model, loss)

    plain.model.vlm.model.visual.requires_grad_(False)
    expected = reference_stage2_step(plain, batch)
    reference = gradients(plain, expected)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert largest_difference(found, reference) < 1e-4

    # The control: without the gradient through the latents the loss is the same and the gradients are not.
    plain.model.latent_head.register_forward_hook(lambda _, __, output: output.detach())
    detached = reference_stage2_step(plain, batch)
    assert detached.item() == pytest.approx(loss.item(), rel=1e-5)
    assert largest_difference(gradients(plain, detached), reference) > 1e-2


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts allocations on the CPU")
def test_peak_memory_counts_what_is_alive_at_once():
    def run():
        first = torch.empty(2**20)  # 4 MiB
        second = torch.empty(2**21)
        del first
        third = torch.empty(2**19)
        return second, third

    assert peak_memory(run) == 12 * 2**20

    def leave_a_cycle():
        cycle = [torch.empty(2**20)]
        cycle.append(cycle)

    def collect_and_run():
        gc.collect()
        return run()

    gc.disable()
    try:
        assert peak_memory(leave_a_cycle) == 4 * 2**20
        assert peak_memory(collect_and_run) == 12 * 2**20  # and not 4 less
    finally:
        gc.enable()


def test_sides_alternate_and_rounds_are_compared_in_pairs():
    order = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3 and len(times["a"]["seconds"]) == 2
    assert ratio([1.0, 20.0, 3.0], [2.0, 40.0, 2.0]) == 0.5  # a slow round of both changes nothing
    assert ratio([3.0], [1.0, 2.0, 3.0]) == 1.5


def test_ways_of_selecting_are_compared_on_the_same_pictures(model, processor, tmp_path, monkeypatch, capsys):
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(selection, "prepare", lambda threads: None)  # of the process as a whole
    monkeypatch.setattr("sys.argv", ["selection", str(tmp_path), "--traces", "1", "--rounds", "1"])
    found, select = {}, TargetSelector.__call__

    def select_and_note(selector, batch):
        selected, args = select(selector, batch), selector.args
        found[args.selection_method, args.helper_question] = 100 * selected.holds_followed().float().mean()
        return selected

    monkeypatch.setattr(TargetSelector, "__call__", select_and_note)
    selection.main()
    counted, table = capsys.readouterr().out.split("\n\n")[-2:]
    traces = load_task("shifts", boards=1, test_boards=1, lengths=(4, 10), seed=1).dataset("train")
    pictures = sum(len(json.loads(metadata)["followed"]) for metadata in traces["metadata"])
    said = f"{pictures} pictures; ms a picture, of batches of 8 traces with {pictures}"
    assert counted.splitlines()[-1] == said
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    sides = {
        name: found[settings["selection_method"], settings.get("helper_question")]
        for name, settings in selection.SIDES.items()
    }
    assert [row[:2] for row in rows] == [[name, f"{share:.1f}"] for name, share in sides.items()]
    assert all(float(milliseconds) > 0 for *_, milliseconds in rows)
