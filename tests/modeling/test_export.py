"""A step of generation as one graph: what transformers' exporters make of it walks through spans as the model does."""

import copy

import pytest
import torch
from backbones import FULLY_TESTED
from helpers import NEW_TOKENS, PROMPTS, encode, generate
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
from transformers.exporters.utils import decompose_for_generation

from ilvr.latent_cache import CACHE


EXPORTERS = [(DynamoExporter, DynamoConfig, name) for name in FULLY_TESTED] + [(OnnxExporter, OnnxConfig, "qwen3_vl")]


@pytest.mark.parametrize("exporter, config, backbone_name", EXPORTERS, indirect=["backbone_name"])
@torch.no_grad()
def test_an_exported_step_goes_through_spans_as_generate_does(model, processor, exporter, config):
    """Rows in mixed phases, one graph for all steps: latents come out of one and go into the next."""
    inputs = encode(processor, PROMPTS, "left", prompt_only=True)
    expected = generate(model, inputs, return_dict_in_generate=True, output_logits=True)
    _, step = decompose_for_generation(model, inputs)["decode"]
    answer = expected.sequences[:, inputs["input_ids"].shape[1] :]
    assert (answer == model.config.latent_pad_token_id).any()
    exported = exporter().export(model, copy.deepcopy(step), config(dynamic=True))
    step, forgetful = copy.deepcopy(step), copy.deepcopy(step)
    differences = []
    for i in range(NEW_TOKENS - 1):
        spans = forgetful[CACHE].latent_spans
        spans.feedback = torch.zeros_like(spans.feedback)
        for inputs in (step, forgetful):
            inputs["input_ids"] = answer[:, i : i + 1]
        found, other = exported(**step), exported(**forgetful)
        torch.testing.assert_close(found.logits[:, -1], expected.logits[i + 1], rtol=1e-4, atol=1e-5)
        differences.append((other.logits - found.logits).abs().max())
        for inputs, outputs in ((step, found), (forgetful, other)):
            inputs[CACHE], mask = outputs[CACHE], inputs["attention_mask"]
            inputs["position_ids"] = inputs["position_ids"] + 1
            inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    assert max(differences) > 0.01  # with latents of zeros it says something else
