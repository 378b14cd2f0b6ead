"""Reinforcement learning with latents: exact gradients, what is a decision, references, resume, adapters."""

import copy
from dataclasses import fields

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Image, List
from helpers import SAMPLES, gradients, largest_difference, make_dataset, make_image, perturb, prefix_recompute, untie
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from ilvr import ILVRProcessor
from ilvr.latent_decoding import WholeSpansLogitsProcessor
from ilvr.trainer import ILVRGRPOConfig, ILVRGRPOTrainer, make_prompts
from ilvr.trainer.losses import gaussian_log_density
from ilvr.trainer.rewards import accuracy_reward, format_reward, latent_contrast_reward, span_reward


def some_prompts(count: int = 4) -> Dataset:
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
    start_id = (processor or ILVRProcessor.from_pretrained(model)).latent_token_ids[0]
    settings = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 16,
        "gradient_accumulation_steps": 1,
        "loss_type": "grpo",
        "generation_kwargs": {"sequence_bias": [[[start_id], 4.0]]},
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
        train_dataset=some_prompts() if dataset is None else dataset,
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


def policy_loss(log_probs, inputs, kl=0.0):
    """GRPO's loss of the first update, in which the old policy is the policy (arXiv 2402.03300, equation 3)."""
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    ratio = (log_probs - log_probs.detach()).exp()
    return -(((ratio * inputs["advantages"].unsqueeze(1) - kl) * mask).sum(1) / mask.sum(1)).mean()


def test_without_spans_it_is_the_trainer_of_trl(model, processor, tmp_path):
    """The backbone by itself under `GRPOTrainer`: the same completions, losses and weights."""
    backbone = copy.deepcopy(model.vlm)
    prompts, never = some_prompts(1).select([0] * 4), {"suppress_tokens": list(model.config.latent_token_ids)}
    ours = make_grpo_trainer(
        model, processor, tmp_path / "ours", dataset=prompts, generation_kwargs=never, freeze_vision_tower=False
    )
    ours.train()
    known = {field.name for field in fields(GRPOConfig) if field.init}
    settings = {name: value for name, value in vars(ours.args).items() if name in known}
    settings |= {
        "output_dir": str(tmp_path / "theirs"),
        "gradient_checkpointing": False,
        "generation_batch_size": None,
    }
    theirs = GRPOTrainer(
        backbone, length_reward, GRPOConfig(**settings), train_dataset=prompts, processing_class=processor
    )
    theirs.train()
    for own, other in zip(ours.state.log_history[:2], theirs.state.log_history[:2], strict=True):
        assert own["loss"] == pytest.approx(other["loss"], abs=1e-6) and own["reward"] == other["reward"] != 0
    trained, expected = ({n: p.detach() for n, p in m.named_parameters()} for m in (model.vlm, backbone))
    assert largest_difference(trained, expected) < 1e-5


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
    trainer._rollout_latents = [torch.empty(0)] * len(completions)  # the reward does not look at them
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
            train_dataset=some_prompts(),
            processing_class=processor,
            **{name: [length_reward]},
        )


@pytest.mark.parametrize("backbone_name", ["qwen3_5"], indirect=True, scope="session")
def test_linear_attention_is_refused(model, processor, tmp_path):
    with pytest.raises(ValueError, match="changes the state of linear attention"):
        make_grpo_trainer(model, processor, tmp_path)


def test_engines_that_cannot_are_refused(model, processor, tmp_path, monkeypatch):
    with (
        monkeypatch.context() as patched,
        pytest.raises(ValueError, match="do not work with ZeRO-3"),
    ):
        patched.setattr("ilvr.trainer.ilvr_grpo_trainer.is_zero3", lambda accelerator: True)
        make_grpo_trainer(model, processor, tmp_path)
    untie(model)
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    monkeypatch.setattr("ilvr.trainer.running.durable_trainer.prepare_sharding", lambda *_, **__: None)
    with pytest.raises(ValueError, match="rows that PEFT trains .* adapter with DDP"):
        make_grpo_trainer(model, processor, tmp_path, peft_config=LoraConfig(target_modules="all-linear"))


# ------------------------------------------------------------------------------------------ replayed and drawn latents


@pytest.mark.parametrize("backbone_name", ["qwen2_5_vl", "smolvlm"], indirect=True, scope="session")
@pytest.mark.parametrize("rows", [4, 2], ids=["at once", "in chunks"])
def test_replay_is_teacher_forcing(model, processor, tmp_path, rows):
    """With the latents of the rollout, which are the model's own: the log-probabilities of `recompute`, and the
    gradients of a forward pass in which the latents are constants."""
    settings = {"latent_policy": "replay", "per_device_train_batch_size": 4, "num_generations": 2}
    trainer = make_grpo_trainer(model, processor, tmp_path, **settings)
    inputs = roll_out(trainer)
    whole = whole_inputs(inputs)
    latents = {name: inputs[name] for name in ("latent_values", "latent_mask")}
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    forced = log_probs_of(model(**whole, **latents).logits, inputs)
    walked = log_probs_of(model(**whole).logits, inputs)
    torch.testing.assert_close(forced[mask], walked[mask], rtol=1e-4, atol=1e-4)
    expected = gradients(model, policy_loss(forced, inputs))
    found = gradients(model, trainer.compute_loss(trainer.model, inputs))
    assert largest_difference(found, expected) < 1e-5

    images = {name: value for name, value in inputs.items() if name in whole or name == "num_images"}
    log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
        *(model, whole["input_ids"], whole["attention_mask"], forced.shape[1]), batch_size=rows, **images
    )
    torch.testing.assert_close(log_probs[mask], forced[mask], rtol=1e-4, atol=1e-4)


def test_a_density_by_hand():
    """|(1, 2) - (0, 4)|^2 = 5, over 2 * 0.25."""
    found = gaussian_log_density(torch.tensor([[1.0, 2.0], [3.0, 3.0]]), torch.tensor([[0.0, 4.0], [3.0, 3.0]]), 0.5)
    assert found.tolist() == [-10.0, 0.0]


@pytest.mark.parametrize("backbone_name", ["qwen2_5_vl", "smolvlm"], indirect=True, scope="session")
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_drawn_latents_count_by_their_density(model, processor, tmp_path, beta):
    """Of a row whose first latent stands in column t: -|z - latent_head(h_{t-1})|^2 / (2 sigma^2), and so on."""
    sigma = 0.3
    trainer = make_grpo_trainer(model, processor, tmp_path, latent_policy="gaussian", latent_sigma=sigma, beta=beta)
    if beta:
        perturb(trainer.ref_model, seed=5)
    inputs = roll_out(trainer)
    whole, values = whole_inputs(inputs), inputs["latent_values"]
    start, pad, end = model.config.latent_token_ids
    is_latent = inputs["completion_ids"] == pad
    assert inputs["tool_mask"].bool().equal(inputs["completion_ids"] != end)
    hidden = model.model(**whole, latent_values=values, latent_mask=inputs["latent_mask"]).last_hidden_state
    offset = inputs["prompt_ids"].shape[1]
    expected = log_probs_of(model.get_output_embeddings()(hidden), inputs)
    drawn = {row: iter(values[row].flatten(0, 1)) for row in range(len(values))}
    for row, column in is_latent.nonzero().tolist():
        error = next(drawn[row]) - model.model.latent_head(hidden[row, offset + column - 1])
        expected[row, column] = -error.square().sum() / (2 * sigma**2)
    policy_gradients = gradients(model, trainer.compute_loss(trainer.model, inputs))
    images = {name: value for name, value in inputs.items() if name in whole or name == "num_images"}
    found, _, _ = trainer._get_per_token_logps_and_entropies(
        *(model, whole["input_ids"], whole["attention_mask"], is_latent.shape[1]), **images
    )
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-4)
    # The noise has the size that was asked for: D = 32 coordinates.
    errors = (-2 * found[is_latent]).mean()
    assert is_latent.any() and 32 * 0.6 < errors < 32 * 1.4
    kl = 0.0
    if beta:  # of words: exp(r) - r - 1 with r the log-ratio of reference and policy, times policy over old policy
        difference = torch.where(is_latent, 0, inputs["ref_per_token_logps"] - expected)
        assert difference[mask].abs().max() > 0.1
        kl = beta * (difference.exp() - difference - 1) * (expected - expected.detach()).exp()
    assert largest_difference(policy_gradients, gradients(model, policy_loss(expected, inputs, kl))) < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_policy": "walk"}, "must be one of .*, got 'walk'"),
        ({"latent_policy": "gaussian"}, "belongs to latent_policy='gaussian' .* got None with 'gaussian'"),
        ({"latent_sigma": 0.1}, "got 0.1 with 'recompute'"),
        ({"latent_policy": "gaussian", "latent_sigma": -1.0}, "above 0"),
        ({"latent_policy": "gaussian", "latent_sigma": 0.1, "entropy_coef": 0.1}, "Leave top_entropy_quantile"),
    ],
    ids=str,
)
def test_settings_of_latents_that_contradict_each_other(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ILVRGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)


# ------------------------------------------------------------------------------------------------------------ training

POLICIES = [
    {"latent_policy": "recompute"},
    {"latent_policy": "replay"},
    {"latent_policy": "gaussian", "latent_sigma": 1.0},
]
SPEED = {"step_time", "tokens_per_second", "rollout_time"}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["latent_policy"])
@pytest.mark.parametrize("steps", [3, 5], ids=["between rollouts", "in the second epoch"])
def test_resume_equals_an_uninterrupted_run(model, processor, tmp_path, policy, steps):
    """Four prompts, two completions each, in two rollouts of an epoch, each of which is trained on for two steps.

    With this seed the first and the second epoch differ in the prompts of their second rollout.
    """
    settings = {
        "max_steps": steps + 3,
        "steps_per_generation": 2,
        "per_device_train_batch_size": 2,
        "beta": 0.1,
        **policy,
    }
    settings |= {"logging_steps": 2, "seed": 4}
    saving = {"save_strategy": "steps", "save_steps": steps}
    whole_model, resumed_model = copy.deepcopy(model), copy.deepcopy(model)
    whole = make_grpo_trainer(whole_model, processor, tmp_path / "a", **settings, **saving)
    whole.train()
    resumed = make_grpo_trainer(resumed_model, processor, tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{steps}"))
    for (name, a), b in zip(whole_model.named_parameters(), resumed_model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    assert not all(a.equal(b) for a, b in zip(whole_model.parameters(), model.parameters()))
    for a, b in zip(whole.state.log_history[:-1], resumed.state.log_history[:-1], strict=True):
        assert a.keys() == b.keys() and all(a[name] == b[name] for name in a.keys() - SPEED)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["latent_policy"])
def test_rewards_are_learned_and_the_log_says_how(model, processor, tmp_path, policy):
    """A reward for opening no span: fewer are opened. The loss of each micro-batch is over its own tokens."""
    start = model.config.latent_start_token_id

    def few_spans(completion_ids, **kwargs):
        return [-float(ids.count(start)) for ids in completion_ids]

    settings = {"max_steps": 12, "per_device_train_batch_size": 8, "num_generations": 8, "learning_rate": 1e-2}
    settings |= {"generation_kwargs": {"sequence_bias": [[[start], 5.0]]}}
    trainer = make_grpo_trainer(model, processor, tmp_path, reward=few_spans, **settings, **policy)
    trainer.train()
    logs = trainer.state.log_history[:-1]
    assert sum(log["spans_per_sample"] for log in logs[-3:]) < 0.5 * sum(log["spans_per_sample"] for log in logs[:3])
    first = logs[0]
    assert first["latent_norm_drift"] == pytest.approx(1) and first["latent_norm"] > 0
    assert 0 <= first["samples_without_spans"] < 1 and first["entropy"] > 0
    assert 0 < first["rollout_time"] < first["step_time"] and first["tokens_per_second"] > 0
    assert first["num_tokens"] < logs[1]["num_tokens"] and first["rewards/few_spans/mean"] < 0


def test_prompts_of_conversations_and_our_rewards(model, processor, tmp_path):
    """Completions that are cut off are masked; each is scored by each reward; evaluation logs the same."""
    samples = make_dataset([{**sample, "answer": "R"} for sample in SAMPLES[:4]])
    rewards = [accuracy_reward("boxed_exact_match"), format_reward, span_reward(processor)]
    settings = {"mask_truncated_completions": True, "max_steps": 1, "loss_type": "dapo"}
    prompts = make_prompts(samples)
    trainer = make_grpo_trainer(model, processor, tmp_path, rewards, dataset=prompts, **settings)
    trainer.train()
    names = {f"rewards/{name}/mean" for name in ("accuracy", "format_reward", "opens_span")}
    assert names <= trainer.state.log_history[0].keys()
    trainer.mask_truncated_completions = False
    metrics = trainer.evaluate(prompts)
    assert {"eval_spans_per_sample", "eval_entropy", "eval_latent_norm"} <= trainer.state.log_history[-1].keys()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss"])


def test_rewards_see_the_latents_of_each_completion(model, processor, tmp_path):
    """Those that are scored with it, whose rows are shuffled afterwards."""
    seen = {}

    def keep(completions, completion_ids, latents, **kwargs):
        seen.update(zip(map(tuple, completion_ids), latents, strict=True))
        return [0.0] * len(completions)

    rewards = [keep, latent_contrast_reward("boxed_exact_match")]
    prompts = some_prompts().rename_column("answer", "reference")
    trainer = make_grpo_trainer(model, processor, tmp_path, rewards, dataset=prompts, latent_policy="replay")
    inputs = roll_out(trainer)
    rows = zip(inputs["completion_ids"], inputs["completion_mask"], inputs["latent_values"], strict=True)
    start_id = model.config.latent_start_token_id
    assert max(len(own) for own in seen.values()) > 0
    for ids, mask, values in rows:
        own = seen[tuple(ids[mask.bool()].tolist())]
        assert len(own) == (ids == start_id).sum() and own.equal(values[: len(own)])
    assert trainer._metrics["train"]["rewards/latent_contrast/mean"][0] > 0


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["latent_policy"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_adapters_train(model, processor, tmp_path, policy, beta):
    """The base, whose weights do not move, is the reference; the adapter trains the rows of the latent tokens, too."""
    before = copy.deepcopy(model)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True)
    settings = {"beta": beta, "num_iterations": 2, "max_steps": 4, **policy}
    trainer = make_grpo_trainer(model, processor, tmp_path, peft_config=lora, **settings)
    trainer.train()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("lora_B" in name and p.any() for name, p in trained.items())
    assert all("lora_" in name or "trainable_tokens" in name for name in trained)
    inputs = roll_out(trainer)
    model = trainer.model
    whole, mask = whole_inputs(inputs), (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    mask &= inputs["completion_ids"] != before.config.latent_pad_token_id
    given = {name: inputs[name] for name in ("latent_values", "latent_mask") if name in inputs}
    images = {name: value for name, value in inputs.items() if name in whole or name == "num_images"}
    with torch.no_grad():
        trainer.compute_loss(model, inputs)  # a batch is in another order than the rollouts were
        found, _, _ = trainer._get_per_token_logps_and_entropies(
            *(model, whole["input_ids"], whole["attention_mask"], mask.shape[1]), **images
        )
        expected = log_probs_of(model(**whole, **given).logits, inputs)
        base = log_probs_of(before(**whole, **given).logits, inputs)
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert (base - expected)[mask].abs().max() > 1e-3
    if beta:
        torch.testing.assert_close(inputs["ref_per_token_logps"][mask], base[mask], rtol=1e-4, atol=1e-4)


def test_an_adapter_is_trained_further(model, processor, tmp_path):
    """As it was saved, by its folder: it is its own reference, as it was."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True)
    first = make_grpo_trainer(model, processor, tmp_path / "first", peft_config=lora)
    first.train()
    first.save_model()
    trainer = make_grpo_trainer(str(tmp_path / "first"), None, tmp_path / "second", beta=0.1, max_steps=3)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B.default" in name}
    saved = dict(first.model.named_parameters())
    assert start and all(p.equal(saved[name]) for name, p in start.items())
    trainer.train()
    kl = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-5
    now = dict(trainer.model.named_parameters())
    assert any(not now[name].equal(p) for name, p in start.items())
    assert all(now[name.replace(".default", ".ref")].equal(p) for name, p in start.items())
