"""Reinforcement learning of latent visual reasoning: GRPO on rollouts with latent spans.

Shapes: B batch, T sequence, C completion, S spans, K latents a span, D hidden.
"""

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from ilvr import ILVRProcessor, is_forced, pad_spans
from ilvr.latent_spans import scatter_spans

from .ilvr_grpo_config import ILVRGRPOConfig
from .inputs.prompts import SeededByEpoch
from .losses import gaussian_log_density
from .rollouts import WithLatents, rollouts_with_latents
from .running.adapters import (
    complete_head,
    complete_peft_config,
    complete_reference_adapter,
    freeze_vision_tower,
    ilvr_model,
)
from .running.checks import check_agreement, check_rows_of_any_length, warn_of_slow_bf16
from .running.durable_trainer import DurableTrainer
from .running.loading import load_model, load_processor
from .running.sharding import (
    chunks_of_all_ranks,
    gathered,
    is_sharded,
    is_zero3,
    keep_vision_whole,
    shard_for_inference,
)


REFUSED = ("tools", "environment_factory", "rollout_func")


class ILVRGRPOTrainer(DurableTrainer, GRPOTrainer):
    """
    Group relative policy optimization (GRPO, arXiv 2402.03300) of a model that thinks in latents.

    Rollouts are the model's own `generate`, each row in its own phase. The ids of a completion say where its spans
    are; each model that scores them (policy, old policy, reference) walks its own latents again, so the gradient of
    the words' log-probabilities flows through the latents, exactly (`args.latent_policy` has other ways).
    `<|latent_start|>` is a decision like any word. The ids that follow from it, `<|latent_pad|>` and `<|latent_end|>`,
    are in neither loss, KL nor entropy, and no completion ends within a span.

    Args:
        model (`str`, [`ILVRForConditionalGeneration`] or `PeftModel` over one): the policy; as a string, the Hub id or
            folder of an ILVR checkpoint, or of an adapter. What training starts from is the reference, if
            `args.beta` is not 0.
        reward_funcs (`Callable` or `list[Callable]`): as in [`~trl.GRPOTrainer`]; they are given
            `latents` as well, see `ilvr.trainer.rewards`.
        args ([`ILVRGRPOConfig`], *optional*).
        train_dataset, eval_dataset (`Dataset`, `IterableDataset` or, for eval, a `dict` of them): TRL's prompts: a
            conversation in `prompt`, pictures in `images` or `image`, and what the rewards ask for.
        processing_class ([`ILVRProcessor`], *optional*): loaded from the model's repository if not given.
        callbacks (`list[TrainerCallback]`, *optional*): as in [`~transformers.Trainer`].
        peft_config (`PeftConfig`, *optional*): trains an adapter, completed by what latent spans need.
        kwargs: further arguments of [`~trl.GRPOTrainer`].

    Raises:
        ValueError: before training starts, if processor and model disagree, or for what cannot have latents: tools,
            environments and rollouts of one's own, ZeRO-3, adapters under FSDP2, linear attention.

    Example:

    ```python
    >>> from ilvr.trainer import ILVRGRPOConfig, ILVRGRPOTrainer

    >>> args = ILVRGRPOConfig("out", num_generations=8, max_completion_length=64)
    >>> trainer = ILVRGRPOTrainer("stage2", reward, args, train_dataset=prompts)
    >>> trainer.train()
    ```
    """

    args: ILVRGRPOConfig
    _tag_names = ["trl", "grpo", "ilvr"]
    _name = "ILVR GRPO"

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any,
        args: ILVRGRPOConfig | None = None,
        *,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: ILVRProcessor | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        for name in REFUSED:
            if kwargs.get(name):
                raise ValueError(f"{name} makes completions of several parts, whose latents are not kept. Remove it.")
        args = args or ILVRGRPOConfig("ilvr-output")
        if processing_class is None:
            source = model if isinstance(model, str) else model.config._name_or_path
            processing_class = load_processor(source, trust_remote_code=args.trust_remote_code)
        if isinstance(model, str):
            # TRL has parsed the string of a command line.
            given = cast(dict[str, Any], args.model_init_kwargs or {})
            model = load_model(model, trust_remote_code=args.trust_remote_code, **given)
            args.model_init_kwargs = None
        base_model = ilvr_model(model)
        check_agreement(base_model, processing_class)
        check_rows_of_any_length(base_model)
        warn_of_slow_bf16(base_model, args)
        if args.freeze_vision_tower:
            freeze_vision_tower(base_model)
        if peft_config is not None and not isinstance(model, PeftModel):
            peft_config = complete_peft_config(peft_config, model, freeze_vision=args.freeze_vision_tower)

        # TRL loads a reference by the name of the model, which is that of a backbone or of an earlier phase.
        adapts = peft_config is not None or isinstance(model, PeftModel)
        reference = copy.deepcopy(model) if args.beta and not adapts else None
        beta, sync = args.beta, args.sync_ref_model
        if reference is not None:
            args.beta, args.sync_ref_model = 0.0, False
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
            **kwargs,
        )
        args.beta, args.sync_ref_model = beta, sync
        if is_zero3(self.accelerator):
            raise ValueError("Rollouts with latents do not work with ZeRO-3. Train with FSDP2, ZeRO-2 or DDP.")
        if self.accelerator.is_fsdp2 and not isinstance(self.student.get_output_embeddings(), torch.nn.Linear):
            raise ValueError(
                "TRL's fused head reads the rows that PEFT trains outside of the forward that gathers them. Train the "
                "adapter with DDP or ZeRO-2."
            )
        if self.aux_loss_enabled:
            raise ValueError("An ILVR model hands on no router logits. Set router_aux_loss_coef to 0.")
        self.first_latent_norm = 0.0
        complete_head(self.model)
        complete_reference_adapter(self.model)
        if reference is not None:
            self._set_reference(reference)

    def _set_reference(self, reference: PreTrainedModel) -> None:
        """What `GRPOTrainer` does with a reference that it has loaded."""
        self.beta = self.args.beta
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        add_fused_lm_head(reference, temperature=self.temperature)
        self.ref_model = reference
        if self.accelerator.is_fsdp2:
            if self.args.freeze_vision_tower:
                keep_vision_whole(self.accelerator, reference.model)  # as the student's, to be compared with it
            shard_for_inference(self.accelerator, reference)
        elif self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    # -------------------------------------------------------------------------------------------------------- rollouts

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        rollouts = rollouts_with_latents(self.student, self.args.latent_sigma)
        with gathered(self.accelerator, self.model), rollouts as latents:
            completions = super()._generate_single_turn(*args, **kwargs)
        self._latents = pad_spans(latents)
        self._rollout_latents = latents
        self._record_rollouts(latents, time.perf_counter() - started)
        return completions

    def _record_rollouts(self, latents: list[torch.Tensor], seconds: float) -> None:
        spans = torch.tensor([float(len(row)) for row in latents])
        self.record(1, rollout_time=seconds)
        self.record(len(spans), spans_per_sample=spans.mean(), samples_without_spans=(spans == 0).float().mean())
        norms = torch.cat(latents).norm(dim=-1)  # (spans, K)
        if norms.numel():
            self.first_latent_norm = self.first_latent_norm or norms.mean().item()
            self.record(
                norms.numel(), latent_norm=norms.mean(), latent_norm_drift=norms.mean() / self.first_latent_norm
            )

    def _generate(self, prompts: list) -> tuple:
        prompt_ids, completion_ids, _, *others = super()._generate(prompts)
        # TRL's mask of what tools have said: 0 for ids that are no decision, in neither loss, KL nor entropy.
        decided = [self._is_decision(torch.tensor(ids, dtype=torch.long)).long().tolist() for ids in completion_ids]
        return prompt_ids, completion_ids, decided, *others

    def _is_decision(self, ids: torch.Tensor) -> torch.Tensor:
        """Which ids of completions are decisions, of the ids' shape: words, starts of spans, and latents if drawn."""
        forced = is_forced(ids, self.student.config)
        if self.args.samples_latents:
            forced &= ids != self.student.config.latent_pad_token_id
        return ~forced

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        outputs = super()._generate_and_score_completions(inputs)
        if self.args.latent_policy != "recompute":
            outputs["latent_values"], outputs["latent_mask"] = self._latents
        return outputs

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = [{**row, "latents": own} for row, own in zip(inputs, self._rollout_latents, strict=True)]
        return super()._calculate_rewards(rows, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------------- the loss

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        self._scored = inputs = dict(inputs)
        if self.args.latent_policy != "recompute":
            self._latents = inputs["latent_values"], inputs["latent_mask"]
        self.record_tokens(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        scored: Any = model
        if self.args.latent_policy != "recompute":
            core = ilvr_model(self.accelerator.unwrap_model(model)).model
            scored = WithLatents(model, core, *self._latents)
        elif is_sharded(self.accelerator):
            is_latent = input_ids == self.student.config.latent_pad_token_id
            scored = partial(model, min_chunks=chunks_of_all_ranks(self.accelerator, is_latent))
        log_probs, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            scored, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        ids = input_ids[:, -logits_to_keep:]  # (B, C), of the completions
        if entropies is not None:
            words = attention_mask[:, -logits_to_keep:].bool() & ~is_forced(ids, self.student.config)
            self.record(words.sum(), entropy=entropies[words].mean())
        if self.args.samples_latents and self._latents[0].shape[1]:
            is_latent = ids == self.student.config.latent_pad_token_id
            sigma = cast(float, self.args.latent_sigma)
            densities = gaussian_log_density(self._latents[0], scored.predicted, sigma)  # (B, S, K)
            log_probs = scatter_spans(
                log_probs.unsqueeze(-1), is_latent, densities.unsqueeze(-1), self._latents[1]
            ).squeeze(-1)
            if entropies is not None and self.beta:  # in the loss
                # TRL's estimate of the KL divergence takes the exponential of a difference of densities in D
                # dimensions, which overflows. It is 0, and so is its gradient, where policy and reference agree.
                reference = self._scored["ref_per_token_logps"]
                self._scored["ref_per_token_logps"] = torch.where(is_latent, log_probs.detach(), reference)
        return log_probs, entropies, aux_loss

    # ------------------------------------------------------------------------------------- what belongs to a run

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Our own go on in a resumed run, and are of words alone.
        for name in ("num_tokens", "step_time", "entropy"):
            self._metrics["train" if self.model.training else "eval"].pop(name, None)
        super().log(logs, start_time)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return SeededByEpoch(super()._get_train_sampler(dataset), self.args.seed)

    def _rollouts_file(self, folder: str) -> Path:
        return Path(folder, f"rollouts_{self.args.process_index}.pt")

    def save_method_state(self, folder: str) -> None:
        whole = self._step % (cast(int, self.args.steps_per_generation) * self.num_iterations) == 0
        state = {
            "step": self._step,
            "rollouts": None if whole else self._buffered_inputs,
            "metrics": dict(self._metrics["train"]),
            "first_latent_norm": self.first_latent_norm,
        }
        torch.save(state, self._rollouts_file(folder))

    def load_method_state(self, folder: str) -> None:
        state = torch.load(self._rollouts_file(folder), map_location=self.accelerator.device, weights_only=True)
        self._step, self._buffered_inputs = state["step"], state["rollouts"]
        self._metrics["train"].update(state["metrics"])
        self.first_latent_norm = state["first_latent_norm"]

    def method_files(self) -> list[str]:
        return ["rollouts_*.pt"]

    def run_settings(self) -> dict[str, Any]:
        return {"latent_policy": self.args.latent_policy, **super().run_settings()}

    def card_settings(self) -> dict[str, Any]:
        args = self.args
        sigma = {"sigma of latents": args.latent_sigma} if args.samples_latents else {}
        return {
            "method": f"GRPO ({args.loss_type}, beta {args.beta})",
            "latents of rollouts": args.latent_policy,
            **sigma,
            "completions a prompt": args.num_generations,
            "rewards": ", ".join(self.reward_func_names),
        }
