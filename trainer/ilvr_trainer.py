"""Trains latent visual reasoning: stage 1 with a momentum teacher, stage 2 through the model's own latents.

Shapes: B batch, T sequence, S spans, K latents a span, N candidates, D hidden, V vocabulary.
"""

import os

import torch
from accelerate.utils import gather_object, is_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import has_length
from transformers.utils import logging
from trl import SFTTrainer

from ilvr.hub_cards import ILVRModelCard
from ilvr.latent_rollout import chunk_bounds

from .adapters import complete_peft_config, freeze_vision_tower, ilvr_model
from .checkpoints import CheckpointWriter, resolve_checkpoint, warn_of_earlier_run
from .data_collator import HELPER_PREFIX, LatentDataCollator
from .data_preparation import PREPARED_COLUMNS, merge_images, prepare_dataset
from .ilvr_training_config import ILVRTrainingConfig
from .image_features import cache_features, flatten_features, image_outputs, without_pixels
from .losses import alignment_loss, mean_pairwise_cosine, token_loss
from .running_log import load_running_log, save_running_log
from .sampler import SpanGroupedSampler
from .selection import (
    global_query,
    group_candidates,
    masked_mean,
    select_by_query,
    select_without_query,
    span_text_masks,
)
from .sharding import ShardingCallback, is_sharded, prepare_sharding
from .teacher import TEACHER_FILE, MomentumTeacher, TeacherUpdateCallback


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
        _check_agreement(base_model, processing_class)
        _check_batch_size(base_model, args, eval_dataset)
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
        return SpanGroupedSampler(
            dataset["num_spans"], dataset["length"], batch_size=batch_size, seed=self.args.data_seed or self.args.seed
        )

    # ---------------------------------------------------------------------------------------------- the training step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        assistant_mask, shift_labels = inputs.pop("assistant_mask"), inputs.pop("shift_labels")
        helper_inputs = {
            k.removeprefix(HELPER_PREFIX): inputs.pop(k) for k in list(inputs) if k.startswith(HELPER_PREFIX)
        }
        inputs.pop("image_lengths", None)

        # 1. Images: encoded once, shared by teacher and student while the vision tower is frozen.
        if self.args.freeze_vision_tower:
            inputs = self._encode_user_images(inputs)
        targets = target_mask = None
        if self.args.stage == 1:
            with torch.no_grad(), self.accelerator.autocast():
                # 2. and 3. The teacher reads the same sequences and selects the targets of each span.
                targets, target_mask = self._select_targets(inputs, helper_inputs, assistant_mask)

        # 4. The student, with the targets in the latent positions (stage 1) or its own latents (stage 2).
        # Logits only where some row has a label, unless the caller asked for them.
        wanted = torch.ones_like(shift_labels[0]) if return_outputs else (shift_labels != -100).any(0)
        columns = wanted.nonzero().flatten()
        outputs = model(
            **inputs,
            latent_values=targets,
            latent_mask=target_mask,
            min_chunks=self._chunks_of_all_ranks(inputs["input_ids"]),
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
            self._record(alignment_loss=alignment, latent_cosine=cosine)
            # Weighted, like the cross-entropy, by its share in all micro-batches and ranks of a step.
            if num_items_in_batch is not None:
                alignment = alignment * target_mask.flatten(1).any(1).sum() / self._samples_per_rank
            loss = loss + self.args.alignment_weight * alignment
        self._record_tokens(inputs, outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss

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
        pads = input_ids == self.student.config.latent_pad_token_id
        return int(self.accelerator.gather(torch.tensor([len(chunk_bounds(pads))], device=pads.device)).max())

    def _encode_user_images(self, inputs: dict) -> dict:
        with torch.no_grad(), self.accelerator.autocast():
            outputs = image_outputs(inputs, self.student.model.core)
        return inputs if outputs is None else {**without_pixels(inputs), "mm_encoder_outputs": {"image": outputs}}

    def _select_targets(self, inputs, helper_inputs, assistant_mask):
        """Targets (B, S, K, D) and their mask (B, S, K)."""
        args, input_ids = self.args, inputs["input_ids"]
        config = self.student.config
        counts = (input_ids == config.latent_start_token_id).sum(1)  # (B,): spans of each row
        num_spans = int(counts.max())
        if not num_spans:
            if is_sharded(self.accelerator):
                self._teacher_states(inputs, num_spans)  # other ranks gather the teacher's weights from this one
            return None, None
        vision = self.student.model if args.freeze_vision_tower else self.teacher.model
        outputs = image_outputs(helper_inputs, vision.core)
        features = flatten_features(outputs.pooler_output).float().split(helper_inputs["image_lengths"].tolist())
        groups = [group_candidates(f, args.max_candidates) for f in features]  # one (N, D) for each helper image
        padded = pad_sequence(groups, batch_first=True)  # (images, N, D)
        owner = torch.arange(num_spans, device=counts.device) < counts.unsqueeze(1)  # (B, S): which spans there are
        candidates = padded.new_zeros(*owner.shape, *padded.shape[1:])
        candidates[owner] = padded
        lengths = torch.tensor([len(g) for g in groups], device=counts.device)
        places = torch.arange(padded.shape[1], device=counts.device)
        candidate_mask = torch.zeros(candidates.shape[:3], dtype=torch.bool, device=counts.device)
        candidate_mask[owner] = places < lengths.unsqueeze(1)

        if args.selection_method == "query_top_p":
            hidden = self._teacher_states(inputs, num_spans)
            is_image = input_ids == config.image_token_id
            prompt = inputs["attention_mask"].bool() & ~assistant_mask & (assistant_mask.cumsum(1) == 0)
            latent_ids = self.processing_class.latent_token_ids
            text_masks = span_text_masks(input_ids, assistant_mask, latent_ids, num_spans)
            targets, mask, _, mass = select_by_query(
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
            targets, mask, _, mass = select_without_query(
                candidates, candidate_mask, method=args.selection_method, max_selected=config.latent_size
            )
        self._record(
            selected_per_span=mask.sum(-1)[owner].float().mean(),
            selected_mass=mass[owner].mean(),
            spans_per_sample=counts.float().mean(),
            target_similarity=mean_pairwise_cosine(targets[mask][:512]),
        )
        return targets, mask

    def _teacher_states(self, inputs, num_spans: int) -> torch.Tensor:
        """The teacher's last-layer hidden states (B, T, D), fp32; latent positions keep the embedding of the pad."""
        config = self.student.config
        shape = (len(inputs["input_ids"]), num_spans, config.latent_size)
        unused = torch.zeros(*shape, config.get_text_config().hidden_size, device=inputs["input_ids"].device)
        outputs = self.teacher(**inputs, latent_values=unused, latent_mask=unused[..., 0].bool(), use_cache=False)
        return outputs.last_hidden_state.float()

    # -------------------------------------------------------------------------------------------------------- the log

    def _record(self, **values):
        """Keeps values of this rank; ranks may record unequally often, and are averaged in `log`."""
        mode = "train" if self.model.training else "eval"
        for name, value in values.items():
            self._metrics[mode][name].append(float(value))

    def _average_over_ranks(self, mode: str):
        sums = {name: (sum(values), len(values)) for name, values in self._metrics[mode].items() if values}
        ranks = gather_object([sums]) if self.accelerator.num_processes > 1 else [sums]
        self._metrics[mode].clear()
        for name in sorted(set().union(*ranks)):
            total, count = (sum(numbers) for numbers in zip(*(rank[name] for rank in ranks if name in rank)))
            self._metrics[mode][name] = [total / count]

    @torch.no_grad()
    def _record_tokens(self, inputs, logits, labels):
        mode = "train" if self.model.training else "eval"
        counted = labels != -100
        scored = logits[counted].float()
        labels = labels[counted]
        log_probs = scored.log_softmax(-1)
        self._record(
            ce_loss=-log_probs.gather(1, labels.unsqueeze(1)).mean(),
            entropy=-(log_probs.exp() * log_probs).sum(-1).mean(),
            mean_token_accuracy=(scored.argmax(-1) == labels).float().mean(),
        )
        if mode == "train":
            num_tokens = self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += num_tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs, start_time=None):
        self._average_over_ranks("train" if self.model.training else "eval")
        if self.teacher is not None and self.model.training:
            logs["teacher_distance"] = self.teacher.distance(self.student.model)
            similarity = self._metrics["train"].get("target_similarity")
            if similarity and sum(similarity) / len(similarity) > 0.99:
                logger.warning_once(
                    "The targets of the alignment loss are nearly all alike (mean cosine above 0.99): a cosine loss "
                    "is then satisfied by their common direction. Freeze the vision tower if it is trained, and check "
                    "that the backbone can tell the helper images apart."
                )
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


def _check_agreement(model, processor):
    config = model.config
    if config.latent_size != processor.latent_size:
        raise ValueError(
            f"The model's latent_size is {config.latent_size}, the processor's {processor.latent_size}. Build both "
            "with the same latent_size."
        )
    ids = (config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id)
    if ids != processor.latent_token_ids:
        raise ValueError(
            f"The model's latent ids are {ids}, the processor's {processor.latent_token_ids}. Use the processor that "
            "was saved with the model."
        )


def _check_batch_size(model, args, eval_dataset):
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    batch_size = max(args.per_device_train_batch_size, args.per_device_eval_batch_size if eval_dataset else 1)
    if "linear_attention" in layer_types and batch_size > 1:
        raise ValueError(
            f"A batch of {batch_size} aligns the spans of its rows by padding between words, which changes the state "
            "of linear attention. Set per_device_train_batch_size and per_device_eval_batch_size to 1 and accumulate."
        )
