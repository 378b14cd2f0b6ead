"""Gradients of weights that are made once for all uses equal those that autograd makes for each."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import SPAN_SAMPLES, encode, next_token_loss, run_without_ilvr
from helpers import gradients as gradients_of
from safetensors.torch import load_file
from torch import nn
from transformers.dynamic_module_utils import get_imports

import ilvr
from ilvr.latent_filling import ChunkGradients
from ilvr.weight_gradients import GatheredWeightGradients


WIDTHS = (70, 1, 1, 5, 1)  # columns of the chunks of a sequence


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6, bias=False))


def walk(layers, mode=None):
    """Starts each chunk with the end of the one before."""
    generator = torch.Generator().manual_seed(1)
    feedback, total = torch.zeros(2, 1, 6), 0
    for width in WIDTHS:
        chunk = torch.cat([feedback, torch.randn(2, width - 1, 6, generator=generator)], dim=1)
        if mode is None:
            outputs = layers(chunk)
        else:
            with mode:
                outputs = layers(chunk)
        feedback, total = outputs[:, -1:].float(), total + outputs.float().square().sum()
    return total


def gradients(layers, loss, **kwargs):
    layers.zero_grad()
    loss.backward(**kwargs)
    return [None if p.grad is None else p.grad.clone() for p in layers.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_each_use(layers, dtype):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = gradients(layers, walk(layers))
        found = gradients(layers, walk(layers, GatheredWeightGradients()))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2  # autocast rounds each product to bf16
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < tolerance * other.norm()


def test_one_product_a_weight(layers):
    """Not one for each use, and none of the narrow ones by itself."""
    loss = walk(layers, GatheredWeightGradients())
    with torch.profiler.profile(record_shapes=True) as record:
        gradients(layers, loss)
    shapes = [e.input_shapes[:2] for e in record.events() if e.name == "aten::mm"]
    rows = 2 * sum(width for width in WIDTHS if width < 32)
    assert shapes.count([[8, 140], [140, 6]]) == 1 and not shapes.count([[8, 2], [2, 6]])
    joined = [e.input_shapes[1:3] for e in record.events() if e.name == "aten::addmm_"]
    assert joined.count([[8, rows], [rows, 6]]) == 1


def test_frozen_weights_stay_as_they_are(layers):
    layers[0].requires_grad_(False)
    expected = gradients(layers, walk(layers))
    found = gradients(layers, walk(layers, GatheredWeightGradients()))
    assert found[0] is None and found[1] is None
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-5)


def test_two_backward_passes_and_one_for_inputs_alone_do_not_mix(layers):
    expected = gradients(layers, walk(layers))
    scale = torch.ones((), requires_grad=True)
    mode = GatheredWeightGradients()
    with mode:
        first = layers(scale * torch.ones(2, 3, 6))
    torch.autograd.grad(first.sum(), scale, retain_graph=True)
    loss = walk(layers, mode) + 0 * first.sum()
    for _ in range(2):
        for one, other in zip(gradients(layers, loss, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_nothing_is_recorded_without_gradients(layers):
    mode = GatheredWeightGradients()
    with torch.no_grad():
        found, expected = walk(layers, mode), walk(layers)
    assert found.equal(expected) and not mode.collected


# ------------------------------------------------------------------------------------- what travels with a checkpoint


def test_what_travels_trains_without_it(model, processor, tmp_path):
    """The code that a stranger trusts holds no more than inference needs, and its gradients are the same."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    travels = {file.name for file in (tmp_path / "model").glob("*.py")}
    stays = {file.name for file in Path(ilvr.__file__).parent.glob("*.py")} - travels
    assert stays == {"__init__.py", "weight_gradients.py"}
    asked_for = {package for name in travels for package in get_imports(tmp_path / "model" / name)}
    assert asked_for <= {"torch", "transformers", "jinja2", *sys.stdlib_module_names}  # jinja2: as all chat templates
    assert ChunkGradients.gather is GatheredWeightGradients  # in the package, where the walk makes use of it
    inputs = encode(processor, SPAN_SAMPLES)
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    expected = gradients_of(model, next_token_loss(model(**inputs).logits, inputs))
    run_without_ilvr(
        f"""
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
inputs = torch.load({str(tmp_path / "inputs.pt")!r})
mask = inputs["attention_mask"][:, 1:]
log_probs = model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
(-(log_probs * mask).sum() / mask.sum()).backward()
found = {{name: p.grad.contiguous().clone() for name, p in model.named_parameters() if p.grad is not None}}
save_file(found, {str(tmp_path / "gradients.safetensors")!r})
""",
        tmp_path / "modules",
    )
    found = load_file(tmp_path / "gradients.safetensors")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
