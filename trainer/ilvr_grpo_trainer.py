"""Reinforcement learning of latent visual reasoning: GRPO on rollouts with latent spans.

Shapes: B batch, T sequence, S spans, K latents a span, D hidden.
"""

import copy
import time
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from ilvr import ILVRProcessor, is_forced

from .ilvr_grpo_config import ILVRGRPOConfig
from .rollouts import rollouts_with_latents
from .running.adapters import complete_peft_config, freeze_vision_tower, ilvr_model
from .running.checks import check_agreement, check_rows_of_any_length, warn_of_slow_bf16
from .running.durable_trainer import DurableTrainer
from .running.loading import load_model, load_processor
from .running.sharding import is_sharded


REFUSED = ("tools", "environment_factory", "rollout_func")


class ILVRGRPOTrainer(DurableTrainer, GRPOTrainer):
    """
    Group relative policy optimization (GRPO, arXiv 2402.03300) of a model that thinks in latents.

    Rollouts are the model's own `generate`, each row in its own phase. The ids of a completion say where its spans
    are; each model that scores them (policy, old policy, reference) walks its own latents again, so the gradient of
    the words' log-probabilities flows through the latents, exactly. `<|latent_start|>` is a decision like any word.
    The ids that follow from it, `<|latent_pad|>` and `<|latent_end|>`, are in neither loss, KL nor entropy, and no
    completion ends within a span.

    Args:
        model (`str`, [`ILVRForConditionalGeneration`] or `PeftModel` over one): the policy; as a string, the Hub id or
            folder of an ILVR checkpoint, or of an adapter. What training starts from is the reference, if
            `args.beta` is not 0.
        reward_funcs (`Callable` or `list[Callable]`): as in [`~trl.GRPOTrainer`].
        args ([`ILVRGRPOConfig`], *optional*).
        train_dataset, eval_dataset (`Dataset`, `IterableDataset` or, for eval, a `dict` of them): TRL's prompts: a
            conversation in `prompt`, pictures in `images` or `image`, and what the rewards ask for.
        processing_class ([`ILVRProcessor`], *optional*): loaded from the model's repository if not given.
        callbacks (`list[TrainerCallback]`, *optional*): as in [`~transformers.Trainer`].
        peft_config (`PeftConfig`, *optional*): trains an adapter, completed by what latent spans need.
        kwargs: further arguments of [`~trl.GRPOTrainer`].

    Raises:
        ValueError: before training starts, if processor and model disagree, or for what cannot have latents: tools,
            environments and rollouts of one's own, sharded engines, linear attention.

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
        if peft_config is not None and not is_peft_model(model):
            peft_config = complete_peft_config(peft_config, model, freeze_vision=args.freeze_vision_tower)

        # TRL loads a reference by the name of the model, which is that of a backbone or of an earlier phase.
        adapts = peft_config is not None or is_peft_model(model)
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
        if is_sharded(self.accelerator):
            raise ValueError(
                "The ranks of a sharded model have to run equally many forwards, and their rollouts have spans in "
                "different columns. Train with DDP or ZeRO-2."
            )
        if self.aux_loss_enabled:
            raise ValueError("An ILVR model hands on no router logits. Set router_aux_loss_coef to 0.")
        args.beta, args.sync_ref_model = beta, sync
        if reference is not None:
            self._set_reference(reference)

    def _set_reference(self, reference: PreTrainedModel) -> None:
        """What `GRPOTrainer` does with a reference that it has loaded."""
        self.beta = self.args.beta
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        add_fused_lm_head(reference, temperature=self.temperature)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    # -------------------------------------------------------------------------------------------------------- rollouts

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with rollouts_with_latents(self.student):
            return super()._generate_single_turn(*args, **kwargs)

    def _generate(self, prompts: list) -> tuple:
        prompt_ids, completion_ids, _, *others = super()._generate(prompts)
        decided = [
            (~is_forced(torch.tensor(ids, dtype=torch.long), self.student.config)).long().tolist()
            for ids in completion_ids
        ]
        # TRL's mask of what tools have said: 0 for ids that are no decision, in neither loss, KL nor entropy.
        return prompt_ids, completion_ids, decided, *others
