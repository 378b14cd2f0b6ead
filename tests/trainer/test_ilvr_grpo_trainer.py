"""Reinforcement learning with latents: exact gradients, what is a decision, references, resume, adapters."""

import copy

import pytest
import torch
from datasets import Dataset, Image, List
from helpers import gradients, largest_difference, make_image, prefix_recompute

from ilvr.latent_decoding import WholeSpansLogitsProcessor
from ilvr.trainer import ILVRGRPOConfig, ILVRGRPOTrainer


def make_prompts(count: int = 4) -> Dataset:
    """Prompts of different lengths."""
    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Plan" + " Go" * i}]}],
            "images": [make_image("red" if i % 2 else "blue")],
            "answer": "R D",
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def length_reward(completions, **kwargs) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def make_grpo_trainer(model, processor, folder, reward=length_reward, peft_config=None, dataset=None, **kwargs):
    """A trainer whose rollouts open spans often; the bias is on the rollouts alone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 16,
        "gradient_accumulation_steps": 1,
        "loss_type": "grpo",
        "generation_kwargs": {"sequence_bias": [[[base.config.latent_start_token_id], 4.0]]},
        "lr_scheduler_type": "constant",
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **kwargs,
    }
    return ILVRGRPOTrainer(
        model,
        reward,
        ILVRGRPOConfig(str(folder), **settings),
        train_dataset=make_prompts() if dataset is None else dataset,
        processing_class=processor,
        peft_config=peft_config,
    )


def roll_out(trainer) -> dict[str, torch.Tensor]:
    """The inputs of the loss for the first batch, as in training."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def whole_inputs(inputs) -> dict[str, torch.Tensor]:
    """Prompts and completions as a forward pass takes them."""
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        **{name: inputs[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if name in inputs},
    }


def log_probs_of(logits, inputs, temperature=1.0):
    """Of the completions' ids, (B, C)."""
    ids = inputs["completion_ids"]
    logits = logits[:, -ids.shape[1] - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def policy_loss(log_probs, inputs):
    """GRPO's loss of the first update, in which the old policy is the policy (arXiv 2402.03300, equation 3)."""
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    ratio = (log_probs - log_probs.detach()).exp()
    return -((ratio * inputs["advantages"].unsqueeze(1) * mask).sum(1) / mask.sum(1)).mean()


@pytest.mark.parametrize("backbone_name", ["qwen2_5_vl", "smolvlm"], indirect=True, scope="session")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_recomputing_every_prefix(model, processor, tmp_path, checkpointing):
    """Rows in mixed phases, prompts padded on the left and completions on the right, temperature not 1."""
    trainer = make_grpo_trainer(model, processor, tmp_path, temperature=0.7)
    if checkpointing:
        model.activation_checkpointing_enable()
    inputs = roll_out(trainer)
    is_latent = inputs["completion_ids"] == model.config.latent_pad_token_id
    assert is_latent.any() and not is_latent.any(0).equal(is_latent.all(0))
    found = gradients(model, trainer.compute_loss(trainer.model, inputs))
    if checkpointing:
        model.activation_checkpointing_disable()
    log_probs = log_probs_of(prefix_recompute(model, whole_inputs(inputs)), inputs, temperature=0.7)
    expected = gradients(model, policy_loss(log_probs, inputs))
    assert largest_difference(found, expected) < 1e-5


def test_no_gradient_would_be_another_one(model, processor, tmp_path):
    """The control of the test above: with latents as constants the gradient differs."""
    trainer = make_grpo_trainer(model, processor, tmp_path)
    inputs = roll_out(trainer)
    found = gradients(model, trainer.compute_loss(trainer.model, inputs))
    whole = whole_inputs(inputs)
    constants = model(**whole).latent_inputs.detach()
    logits = model(**whole, latent_values=constants).logits
    assert largest_difference(gradients(model, policy_loss(log_probs_of(logits, inputs), inputs)), found) > 1e-2


def test_masks_and_advantages_of_a_worked_example(model, processor, tmp_path, monkeypatch):
    """Two prompts with two completions each; K = 3. Rewards 1 and 3, and 0 and 0."""
    start, pad, end = model.config.latent_token_ids
    word, eos = processor.tokenizer.convert_tokens_to_ids(["Ġ", processor.tokenizer.eos_token])
    completions = [
        [start, pad, pad, pad, end, word, eos],
        [word, word, eos],
        [word, start, pad, pad, pad, end, eos],
        [word, start, pad, pad, pad, end],
    ]
    decided = [[1, 0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0]]
    rewards = [1.0, 3.0, 0.0, 0.0]
    trainer = make_grpo_trainer(model, processor, tmp_path, reward=lambda completions, **kwargs: rewards)
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: (completions, None))
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
    inputs = roll_out(trainer)
    assert (inputs["tool_mask"] * inputs["completion_mask"]).tolist() == decided
    assert inputs["num_items_in_batch"] == 11
    # (1 - 2) / (sqrt(2) + 1e-4) and (3 - 2) / (sqrt(2) + 1e-4); nothing where all rewards are alike.
    assert inputs["advantages"].tolist() == pytest.approx([-0.7070568, 0.7070568, 0.0, 0.0], rel=1e-6)

    # With a ratio of 1 everywhere the loss is - mean of the advantages. Doubled odds of the first row's second
    # decision, its word, make its ratios 1, 2 and 1, the lower of clipped and unclipped being 2 for a bad row:
    # -(4 / 3 * -0.7070568 + 0.7070568) / 4 = 0.0589214. What stands at forced ids does not matter.
    old = torch.zeros(4, 7)
    new = old.masked_fill(torch.tensor(decided) == 0, 50.0)
    new[0, 5] = torch.tensor(2.0).log()
    inputs = {**inputs, "old_per_token_logps": old}
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *args, **kwargs: (new, torch.ones(4, 7), None)
    )
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(0.0589214, rel=1e-5)


def test_a_span_is_not_opened_where_it_would_be_cut_off():
    processor = WholeSpansLogitsProcessor(start_id=2, latent_size=3, max_length=10)
    for length, allowed in ((4, True), (5, True), (6, False), (9, False)):  # start, three latents, end: 5
        scores = torch.zeros(2, 4)
        assert (processor(torch.zeros(2, length), scores)[:, 2] == 0).all() == allowed and (scores == 0).all()


def test_no_completion_ends_within_a_span(model, processor, tmp_path):
    bias = {"sequence_bias": [[[model.config.latent_start_token_id], 100.0]]}
    for length in range(5, 12):
        trainer = make_grpo_trainer(model, processor, tmp_path, max_completion_length=length, generation_kwargs=bias)
        ids = roll_out(trainer)["completion_ids"]
        starts, pads, ends = ((ids == i).sum(1) for i in model.config.latent_token_ids)
        assert (starts == length // 5).all() and pads.equal(3 * starts) and ends.equal(starts)
        assert "generate" not in vars(model)


def test_the_reference_is_what_training_starts_from(model, processor, tmp_path):
    """Also where the model's name is that of its backbone; it thinks its own latents, which differ after a step."""
    before = copy.deepcopy(model)
    trainer = make_grpo_trainer(model, processor, tmp_path, beta=0.1, max_steps=3)
    trainer.train()
    kl = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-3
    inputs = roll_out(trainer)
    found = inputs["ref_per_token_logps"]
    with torch.no_grad():
        expected = log_probs_of(before(**whole_inputs(inputs)).logits, inputs)
        own = log_probs_of(trainer.model(**whole_inputs(inputs)).logits, inputs)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert (found - own)[mask].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_vllm": True}, "use_vllm=True does not work with latents: vLLM feeds"),
        ({"use_transformers_continuous_batching": True}, "continuous batching feeds no latents back"),
        ({"use_transformers_paged": True}, "continuous batching feeds no latents back"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True does not work"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True does not work"),
    ],
    ids=str,
)
def test_what_cannot_have_latents_is_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ILVRGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)


@pytest.mark.parametrize("name", ["tools", "environment_factory", "rollout_func"])
def test_rollouts_of_several_parts_are_refused(model, processor, tmp_path, name):
    args = ILVRGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=f"{name} makes completions of several parts"):
        ILVRGRPOTrainer(
            model,
            length_reward,
            args,
            train_dataset=make_prompts(),
            processing_class=processor,
            **{name: [length_reward]},
        )


@pytest.mark.parametrize("backbone_name", ["qwen3_5"], indirect=True, scope="session")
def test_linear_attention_is_refused(model, processor, tmp_path):
    with pytest.raises(ValueError, match="changes the state of linear attention"):
        make_grpo_trainer(model, processor, tmp_path)
