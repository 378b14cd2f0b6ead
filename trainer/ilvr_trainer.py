"""Trains latent visual reasoning: stage 1 with a momentum teacher, stage 2 through the model's own latents.

Shapes: B batch, T sequence, S spans, K latents a span, N candidates, D hidden, V vocabulary.
"""

import os

import torch
from accelerate.utils import is_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import has_length
from transformers.utils import logging
from trl import SFTTrainer

from ilvr.hub_cards import ILVRModelCard
from ilvr.latent_spans import chunk_bounds

from .ilvr_training_config import ILVRTrainingConfig
from .inputs.data_collator import LatentDataCollator, split_batch
from .inputs.data_preparation import PREPARED_COLUMNS, merge_images, prepare_dataset
from .inputs.image_features import cache_features, flatten_features, image_outputs, without_pixels
from .inputs.sampler import SpanGroupedSampler
from .losses import alignment_loss, mean_pairwise_cosine, token_loss, token_statistics
from .running.adapters import complete_peft_config, freeze_vision_tower, ilvr_model
from .running.checkpoints import CheckpointWriter, resolve_checkpoint, warn_of_earlier_run
from .running.checks import check_agreement, check_batch_size
from .running.running_log import load_running_log, save_running_log
from .running.sharding import ShardingCallback, is_sharded, prepare_sharding
from .selection import (
    Selection,
    global_query,
    group_candidates,
    masked_mean,
    pad_candidates,
    select_by_query,
    select_without_query,
    span_text_masks,
)
from .teacher import TEACHER_FILE, MomentumTeacher, TeacherUpdateCallback
from .watching.clock import StepClock, peak_gpu_memory
from .watching.step_log import sum_over_ranks
from .watching.trackers import SelectionHistogramCallback


logger = logging.get_logger(__name__)


class ILVRTrainer(SFTTrainer):
    """
    Trainer for Interleaved Latent Visual Reasoning (arXiv 2512.05665).

    Args:
        model (`str` or [`ILVRForConditionalGeneration`]): the student.
        args ([`ILVRTrainingConfig`], *optional*).
        train_dataset, eval_dataset (`Dataset`, `IterableDataset` or, for eval, a `dict` of them):
            conversations in TRL's vision format; an image part in an assistant turn is a helper image.
        processing_class ([`ILVRProcessor`], *optional*): loaded from the model's repository if not given.
        kwargs: further arguments of [`~trl.SFTTrainer`].

    Raises:
        ValueError: before training starts, if processor and model disagree, or a sample cannot be trained on.

    Example:

    ```python
    >>> from ilvr import ILVRForConditionalGeneration, ILVRProcessor
    >>> from ilvr.trainer import ILVRTrainer, ILVRTrainingConfig

    >>> model = ILVRForConditionalGeneration.from_backbone("Qwen/Qwen2.5-VL-7B-Instruct", latent_size=8)
    >>> processor = ILVRProcessor.from_backbone("Qwen/Qwen2.5-VL-7B-Instruct", latent_size=8)
    >>> args = ILVRTrainingConfig("out", stage=1)
    >>> trainer = ILVRTrainer(model, args, train_dataset=dataset, processing_class=processor)
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "ilvr"]
    _name = "ILVR"

    def __init__(
        self,
        model,
        args=None,
        *,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks=None,
        peft_config=None,
        **kwargs,
    ):
        args = args or ILVRTrainingConfig("ilvr-output")
        if isinstance(model, str):
            loading = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            if processing_class is None:
                processing_class = AutoProcessor.from_pretrained(model, trust_remote_code=args.trust_remote_code)
            model = AutoModelForImageTextToText.from_pretrained(model, **loading)
            args.model_init_kwargs = None
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(model.config._name_or_path)
        base_model = ilvr_model(model)
        check_agreement(base_model, processing_class)
        check_batch_size(base_model, args, eval_dataset)
        if args.freeze_vision_tower:
            freeze_vision_tower(base_model)
        if peft_config is not None and not is_peft_model(model):
            peft_config = complete_peft_config(peft_config, model, freeze_vision=args.freeze_vision_tower)
        keep_pixels = (torch.bfloat16 if args.bf16 else torch.float32) if args.cache_images else None
        preparation = {
            "processor": processing_class,
            "stage": args.stage,
            "max_length": args.max_length,
            "keep_pixels": keep_pixels,
            "num_proc": args.dataset_num_proc,
        }
        train_dataset = prepare_dataset(train_dataset, **preparation)
        if isinstance(eval_dataset, dict):
            eval_dataset = {k: prepare_dataset(d, **preparation, name=k) for k, d in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare_dataset(eval_dataset, **preparation, name="eval")

        self.teacher = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", LatentDataCollator(processing_class, args.pad_to_multiple_of)),
            callbacks=callbacks,
            peft_config=peft_config,
            **kwargs,
        )
        prepare_sharding(self.accelerator, self.student.model, args)
        if self.accelerator.is_fsdp2:
            self.add_callback(ShardingCallback(self))
        if args.stage == 1:
            self.teacher = MomentumTeacher(self.student.model, args.teacher_decay)
            self.add_callback(TeacherUpdateCallback(self))
            self.add_callback(SelectionHistogramCallback(self))
        self.clock = StepClock()  # after the teacher, whose update is a part of the step
        self.add_callback(self.clock)
        if args.cache_images and args.freeze_vision_tower:
            self.train_dataset = self._cache_features(self.train_dataset)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {k: self._cache_features(d) for k, d in self.eval_dataset.items()}
            elif self.eval_dataset is not None:
                self.eval_dataset = self._cache_features(self.eval_dataset)

    @property
    def student(self):
        """The ILVR model that is trained, without wrappers."""
        return ilvr_model(self.accelerator.unwrap_model(self.model))

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*PREPARED_COLUMNS]

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.accelerator.num_processes
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SpanGroupedSampler(dataset["num_spans"], dataset["length"], batch_size=batch_size, seed=seed)

    # ---------------------------------------------------------------------------------------------- the training step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs, helper_inputs, assistant_mask, shift_labels = split_batch(inputs)

        # 1. Images: encoded once, shared by teacher and student while the vision tower is frozen.
        if self.args.freeze_vision_tower:
            inputs = self._encode_user_images(inputs)
        selection = None
        if self.args.stage == 1:
            with torch.no_grad(), self.accelerator.autocast():
                # 2. and 3. The teacher reads the same sequences and selects the targets of each span.
                selection = self._select_targets(inputs, helper_inputs, assistant_mask)
        targets, target_mask = (None, None) if selection is None else (selection.targets, selection.mask)

        # 4. The student, with the targets in the latent positions (stage 1) or its own latents (stage 2).
        # Logits only where some row has a label, unless the caller asked for them.
        wanted = torch.ones_like(shift_labels[0]) if return_outputs else (shift_labels != -100).any(0)
        columns = wanted.nonzero().flatten()
        outputs = model(
            **inputs,
            latent_values=targets,
            latent_mask=target_mask,
            min_chunks=self._chunks_of_all_ranks(inputs["input_ids"]),
            jacobi_iterations=self.args.jacobi_iterations,
            jacobi_gradient_iterations=self.args.jacobi_gradient_iterations,
            logits_to_keep=columns,
            use_cache=False,
        )

        # 5. The loss and its parts.
        labels = shift_labels[:, columns]
        ce = token_loss(outputs.logits, labels, num_items=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            ce = ce * self.accelerator.num_processes
        loss = self.args.ce_weight * ce if self.args.stage == 1 else ce
        if targets is not None:
            alignment, cosine = alignment_loss(
                outputs.predicted_latents, targets, target_mask, noise_std=self.args.alignment_noise
            )
            num_samples = target_mask.flatten(1).any(1).sum()
            self._record(num_samples, alignment_loss=alignment)
            self._record(target_mask.sum(), latent_cosine=cosine)
            self._record(selection.mask.any(-1).sum(), **selection.statistics())
            self._record(1, target_similarity=mean_pairwise_cosine(targets[target_mask][:512]))
            # Weighted, like the cross-entropy, by its share in all micro-batches and ranks of a step.
            if num_items_in_batch is not None:
                alignment = alignment * num_samples / self._samples_per_rank
            loss = loss + self.args.alignment_weight * alignment
        elif self.args.jacobi_iterations is not None and outputs.latent_inputs is not None:
            residual = (outputs.predicted_latents - outputs.latent_inputs).norm() / outputs.latent_inputs.norm()
            self._record(outputs.latent_inputs.any(-1).sum(), latent_residual=residual)
        self._record((labels != -100).sum(), **token_statistics(outputs.logits, labels))
        spans = (inputs["input_ids"] == self.student.config.latent_start_token_id).sum(1)  # (B,)
        self._record(len(spans), spans_per_sample=spans.float().mean())
        self._record(1, num_tokens=inputs["attention_mask"].sum())
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args, **kwargs):
        self.clock.start()  # the first thing of a step: waiting for data counts
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Counts, beside the words, the samples with targets in all micro-batches of a step: their mean over ranks."""
        start_id = self.student.config.latent_start_token_id
        count = sum((batch["input_ids"] == start_id).any(1).sum() for batch in batch_samples)
        self._samples_per_rank = torch.as_tensor(count, dtype=torch.float32, device=device)
        if self.args.average_tokens_across_devices:
            self._samples_per_rank = self.accelerator.reduce(self._samples_per_rank, "mean")
        return super()._get_num_items_in_batch(batch_samples, device)

    def _chunks_of_all_ranks(self, input_ids) -> int | None:
        if self.args.stage == 1 or not is_sharded(self.accelerator):
            return None
        if self.args.jacobi_iterations is not None:
            return 1  # the same number on all ranks, if none leaves them out
        pads = input_ids == self.student.config.latent_pad_token_id
        return int(self.accelerator.gather(torch.tensor([len(chunk_bounds(pads))], device=pads.device)).max())

    def _encode_user_images(self, inputs: dict) -> dict:
        with torch.no_grad(), self.accelerator.autocast():
            outputs = image_outputs(inputs, self.student.model.core)
        return inputs if outputs is None else {**without_pixels(inputs), "mm_encoder_outputs": {"image": outputs}}

    def _select_targets(self, inputs, helper_inputs, assistant_mask) -> Selection | None:
        """What the teacher selects in the helper images of a batch; `None` if it has none."""
        args, input_ids = self.args, inputs["input_ids"]
        config = self.student.config
        counts = (input_ids == config.latent_start_token_id).sum(1)  # (B,): spans of each row
        num_spans = int(counts.max())
        if not num_spans:
            if is_sharded(self.accelerator):
                self._teacher_states(inputs, num_spans)  # other ranks gather the teacher's weights from this one
            return None
        vision = self.student.model if args.freeze_vision_tower else self.teacher.model
        outputs = image_outputs(helper_inputs, vision.core)
        features = flatten_features(outputs.pooler_output).float().split(helper_inputs["image_lengths"].tolist())
        groups = [group_candidates(f, args.max_candidates) for f in features]  # one (N, D) for each helper image
        candidates, candidate_mask = pad_candidates(groups, counts)

        if args.selection_method == "query_top_p":
            hidden = self._teacher_states(inputs, num_spans)
            is_image = input_ids == config.image_token_id
            prompt = inputs["attention_mask"].bool() & ~assistant_mask & (assistant_mask.cumsum(1) == 0)
            latent_ids = self.processing_class.latent_token_ids
            text_masks = span_text_masks(input_ids, assistant_mask, latent_ids, num_spans)
            selected = select_by_query(
                candidates,
                candidate_mask,
                global_query(hidden, prompt & ~is_image, prompt & is_image),
                masked_mean(hidden.unsqueeze(1), text_masks),
                text_masks.any(-1),
                top_p=args.selection_top_p,
                max_selected=config.latent_size,
                temperature=args.selection_temperature,
            )
        else:
            selected = select_without_query(
                candidates, candidate_mask, method=args.selection_method, max_selected=config.latent_size
            )
        return Selection(*selected, candidates, candidate_mask)

    def _teacher_states(self, inputs, num_spans: int) -> torch.Tensor:
        """The teacher's last-layer hidden states (B, T, D), fp32; latent positions keep the embedding of the pad."""
        config = self.student.config
        shape = (len(inputs["input_ids"]), num_spans, config.latent_size)
        unused = torch.zeros(*shape, config.get_text_config().hidden_size, device=inputs["input_ids"].device)
        outputs = self.teacher(**inputs, latent_values=unused, latent_mask=unused[..., 0].bool(), use_cache=False)
        return outputs.last_hidden_state.float()

    # -------------------------------------------------------------------------------------------------------- the log

    def _record(self, count, **means):
        """Keeps means over `count` things of a micro-batch; `log` averages over all things of all ranks.

        The values stay on the device: reading one would wait for it.
        """
        mode, device = "train" if self.model.training else "eval", self.accelerator.device
        count = torch.as_tensor(count, dtype=torch.float32, device=device)
        for name, mean in means.items():
            mean = torch.as_tensor(mean, dtype=torch.float32, device=device).detach()
            total = torch.where(count > 0, mean * count, 0)  # the mean of nothing is nan
            self._metrics[mode][name] = [sum(self._metrics[mode][name], torch.stack([total, count]))]

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        sums = sum_over_ranks(self._metrics[mode], self.accelerator)
        new_tokens, _ = sums.pop("num_tokens", (0, 0))
        metrics = {name: total / count for name, (total, count) in sums.items() if count}
        if metrics:
            metrics |= peak_gpu_memory(self.accelerator.device)
        if mode == "train":
            self._total_train_tokens += int(new_tokens)
            metrics |= self.clock.read(new_tokens)
        if self.teacher is not None and mode == "train":
            logs["teacher_distance"] = self.teacher.distance(self.student.model)
            if metrics.get("target_similarity", 0) > 0.99:
                logger.warning_once(
                    "The targets of the alignment loss are nearly all alike (mean cosine above 0.99): a cosine loss "
                    "is then satisfied by their common direction. Freeze the vision tower if it is trained, and check "
                    "that the backbone can tell the helper images apart."
                )
        # `SFTTrainer.log` averages what is here, and gives it the prefix of an evaluation.
        metrics["num_tokens"] = self._total_train_tokens
        self._metrics[mode].clear()
        self._metrics[mode].update({name: [value] for name, value in metrics.items()})
        super().log(logs, start_time)

    # ----------------------------------------------------------------------------------------- caching, saving, resume

    def _cache_features(self, dataset):
        """Replaces pixels by the output of the frozen vision tower, once for each image."""

        @torch.no_grad()
        def encode_batch(parts: list[dict]):
            inputs = {k: v.to(self.accelerator.device) for k, v in merge_images(parts).items()}
            with self.accelerator.autocast():
                return image_outputs(inputs, self.student.model.core)

        return cache_features(dataset, encode_batch, key=f"{id(self)} {self.args.output_dir}")

    def model_card(self, model_name: str | None = None) -> ILVRModelCard:
        """The card that every saved checkpoint carries; add results and save it again when there are some."""
        args = self.args
        training = {
            "stage": args.stage,
            "optimizer steps": self.state.global_step,
            "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning rate": args.learning_rate,
            "vision tower": "frozen" if args.freeze_vision_tower else "trained",
            "seed": args.seed,
        }
        if args.stage == 1:
            training |= {
                "teacher decay": args.teacher_decay,
                "selection": args.selection_method
                + f", top-p {args.selection_top_p}, tau {args.selection_temperature}",
                "loss": f"{args.ce_weight} CE + {args.alignment_weight} alignment",
            }
        base_model = self.model.config.vlm_config._name_or_path or None
        return ILVRModelCard(
            model_name=model_name or os.path.basename(os.path.normpath(args.output_dir)),
            latent_size=self.model.config.latent_size,
            repo_id=self.hub_model_id,
            base_model=base_model,
            training=training if self.state.global_step else None,
        )

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **kwargs):
        if self.is_world_process_zero():
            os.makedirs(self.args.output_dir, exist_ok=True)
            self.model_card(model_name).save(self.args.output_dir)

    def save_model(self, output_dir=None, _internal_call=False):
        # With sharded checkpoints Trainer would save nothing here.
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled and not _internal_call else None
        if plugin is not None:
            kind, _ = plugin.state_dict_type, plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)
        if plugin is not None:
            plugin.set_state_dict_type(kind)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.model_card().save(output_dir or self.args.output_dir)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """
        Trains.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint of an earlier run, which this one then
                equals, or `True` for the newest whole one in `args.output_dir`.
            kwargs: further arguments of [`~transformers.Trainer.train`].

        Raises:
            ValueError: if the checkpoint is damaged, or none is whole.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = resolve_checkpoint(
                resume_from_checkpoint, self.args.output_dir, self._files_to_resume()
            )
        elif self.args.save_strategy != "no":
            warn_of_earlier_run(self.args.output_dir)
        return super().train(resume_from_checkpoint, **kwargs)

    def _files_to_resume(self) -> list[str]:
        files = [] if self.teacher is None else [TEACHER_FILE]
        if not (self.args.save_only_model or self.is_deepspeed_enabled or self.is_fsdp_enabled):
            files += ["optimizer.pt", "scheduler.pt", "rng_state*.pth"]
        return files

    def _run_epoch(self, **kwargs):
        # Trainer takes one step too many when it resumes a run that has taken all of its `max_steps` mid-epoch.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.model.train()
            self._load_rng_state(kwargs["resume_from_checkpoint"])

    def _save_checkpoint(self, model, trial):
        folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        with CheckpointWriter(self, folder) as self._checkpoint_writer:
            if self.teacher is not None:
                self.teacher.save(folder, self.args.should_save)
            super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        self._checkpoint_writer.finish()
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.teacher is not None:
            self.teacher.load(resume_from_checkpoint)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        save_running_log(self, output_dir)

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        load_running_log(self, checkpoint)
