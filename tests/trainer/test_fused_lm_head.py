"""TRL's head in a model's forward: it calls the base model alone, and gives the log-probabilities of the logits."""

import copy

import pytest
import torch
from backbones import FULLY_TESTED
from helpers import SPAN_SAMPLES, encode, gradients, largest_difference
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from ilvr.trainer.running.adapters import complete_peft_config


BACKBONES = FULLY_TESTED
# What SFTTrainer and GRPOTrainer ask of it, the latter with a temperature.
USES = {"sft": (1.0, ("log_probs", "entropy", "is_top1")), "grpo": (0.7, ("log_probs", "entropy"))}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_log_probabilities_are_those_of_the_logits(model, processor, use, forced, adapted):
    """Through the model's own latents and with given ones; spans included; and the gradients, too."""
    temperature, outputs = USES[use]
    plain, fused = model, copy.deepcopy(model)
    add_fused_lm_head(fused, temperature=temperature, outputs=outputs)
    if adapted:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        config = complete_peft_config(config, model, freeze_vision=True)
        plain = get_peft_model(plain, config)
        fused = get_peft_model(fused, config)
        fused.load_state_dict(plain.state_dict())
    inputs = dict(encode(processor, SPAN_SAMPLES))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if forced:
        values = plain(**inputs).latent_inputs.detach()
        inputs["latent_values"] = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    counted = labels[:, 1:] != -100
    logits = plain(**inputs).logits[:, :-1] / temperature
    expected = logits.log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
    found = fused(**inputs, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs[counted], expected[counted], rtol=1e-4, atol=1e-4)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(found.entropy[counted], entropy[counted], rtol=1e-4, atol=1e-4)
    want = gradients(plain, expected[counted].mean())
    assert largest_difference(gradients(fused, found.log_probs[counted].mean()), want) < 1e-4
