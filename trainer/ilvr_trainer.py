"""Trains latent visual reasoning: stage 1 with a momentum teacher, stage 2 through the model's own latents.

Shapes: B batch, T sequence, S spans, K latents a span, N candidates, D hidden, V vocabulary.
"""

import os

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from datasets.fingerprint import Hasher
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from trl import SFTTrainer

from ilvr.hub_cards import ILVRModelCard

from .data_collator import HELPER_PREFIX, LatentDataCollator
from .data_preparation import HELPER_IMAGES, USER_IMAGES, pack, prepare_dataset, unpack
from .ilvr_training_config import ILVRTrainingConfig
from .losses import alignment_loss, mean_pairwise_cosine, token_loss
from .selection import (
    global_query,
    group_candidates,
    masked_mean,
    select_by_query,
    select_without_query,
    span_text_masks,
)
from .teacher import MomentumTeacher, TeacherUpdateCallback


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
        if args.stage == 1 and (kwargs.get("peft_config") is not None or is_peft_model(model)):
            raise ValueError("Stage 1 does not support PEFT: the teacher averages full weights. Remove `peft_config`.")
        _check_agreement(model, processing_class)
        if args.freeze_vision_tower:
            freeze_vision_tower(model)
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

        # Before SFTTrainer patches the student's forward: a copy made later would run the student.
        self.teacher = MomentumTeacher(model, args.teacher_decay) if args.stage == 1 else None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", LatentDataCollator(processing_class, args.pad_to_multiple_of)),
            callbacks=callbacks,
            **kwargs,
        )
        if self.teacher is not None:
            self.teacher.to(self.accelerator.device)
            self.add_callback(TeacherUpdateCallback(self))
        if args.cache_images and args.freeze_vision_tower:
            self.train_dataset = self._cache_features(self.train_dataset)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {k: self._cache_features(d) for k, d in self.eval_dataset.items()}
            elif self.eval_dataset is not None:
                self.eval_dataset = self._cache_features(self.eval_dataset)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["input_ids", "assistant_mask", "length", USER_IMAGES, HELPER_IMAGES]

    # ---------------------------------------------------------------------------------------------- the training step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        assistant_mask, shift_labels = inputs.pop("assistant_mask"), inputs.pop("shift_labels")
        helper_inputs = {k: inputs.pop(k) for k in list(inputs) if k.startswith(HELPER_PREFIX)}

        # 1. Images: encoded once, shared by teacher and student while the vision tower is frozen.
        if self.args.freeze_vision_tower:
            inputs = self._encode_user_images(inputs)
        targets = None
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
            latent_mask=None if targets is None else target_mask,
            logits_to_keep=columns,
            use_cache=False,
        )

        # 5. The loss and its parts.
        labels = shift_labels[:, columns]
        ce = token_loss(outputs.logits, labels, num_items=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            ce = ce * self.accelerator.num_processes
        loss = ce
        if targets is not None:
            alignment, cosine = alignment_loss(
                outputs.predicted_latents, targets, target_mask, noise_std=self.args.alignment_noise
            )
            # `num_items_in_batch` divides the cross-entropy by the tokens of all micro-batches of a step.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = self.args.ce_weight * ce + self.args.alignment_weight * alignment / steps
            self._record(alignment_loss=alignment, latent_cosine=cosine)
        self._record_tokens(inputs, outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss

    def _encode_user_images(self, inputs: dict) -> dict:
        with torch.no_grad(), self.accelerator.autocast():
            outputs = self._image_outputs(inputs, self.model)
        pixels = {"pixel_values", "image_features", "image_lengths"}
        kept = {k: v for k, v in inputs.items() if k not in pixels}
        return kept if outputs is None else {**kept, "mm_encoder_outputs": {"image": outputs}}

    def _image_outputs(self, inputs: dict, model):
        """The vision tower's output for the images of a batch, computed or from the cache; `None` without images."""
        if "image_features" in inputs:
            features = inputs["image_features"].split(inputs["image_lengths"].tolist())
            return BaseModelOutputWithPooling(pooler_output=features)
        if "pixel_values" not in inputs:
            return None
        core = self.accelerator.unwrap_model(model).model
        arguments = {k: inputs[k] for k in self.processing_class.image_processor.model_input_names if k in inputs}
        return core.get_image_features(**arguments, return_dict=True)

    def _select_targets(self, inputs, helper_inputs, assistant_mask):
        """Targets (B, S, K, D) and their mask (B, S, K)."""
        args, input_ids = self.args, inputs["input_ids"]
        config = self.model.config
        vision = self.model if args.freeze_vision_tower else self.teacher.model
        helper_inputs = {k.removeprefix(HELPER_PREFIX): v for k, v in helper_inputs.items()}
        features = self._image_outputs(helper_inputs, vision).pooler_output  # one (N, D) for each helper image
        groups = [group_candidates(f.reshape(-1, f.shape[-1]).float(), args.max_candidates) for f in features]
        counts = (input_ids == config.latent_start_token_id).sum(1)  # (B,): spans of each row
        num_spans = int(counts.max())
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
        config = self.model.config
        shape = (len(inputs["input_ids"]), num_spans, config.latent_size)
        unused = torch.zeros(*shape, config.get_text_config().hidden_size, device=inputs["input_ids"].device)
        outputs = self.teacher.model.model(
            **inputs, latent_values=unused, latent_mask=unused[..., 0].bool(), use_cache=False
        )
        return outputs.last_hidden_state.float()

    # -------------------------------------------------------------------------------------------------------- the log

    def _record(self, **values):
        mode = "train" if self.model.training else "eval"
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device)
            self._metrics[mode][name].append(self.accelerator.gather(value).nanmean().item())

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
        if self.teacher is not None and self.model.training:
            logs["teacher_distance"] = self.teacher.distance(self.accelerator.unwrap_model(self.model))
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
        if isinstance(dataset, IterableDataset):
            raise ValueError("`cache_images` needs the length of the data set; set it to False for a streaming one.")

        def encode(rows: dict) -> dict:
            return {column: self._encode_rows(rows[column]) for column in (USER_IMAGES, HELPER_IMAGES)}

        # A fingerprint of our own: hashing the closure would pickle the model.
        fingerprint = Hasher.hash([dataset._fingerprint, id(self), self.args.output_dir])
        return dataset.map(
            encode,
            batched=True,
            batch_size=32,
            keep_in_memory=True,
            new_fingerprint=fingerprint,
            desc="Encoding images",
        )

    @torch.no_grad()
    def _encode_rows(self, rows: list[bytes]) -> list[bytes]:
        unpacked = [unpack(row) for row in rows]
        filled = [tensors for tensors in unpacked if tensors]
        if not filled:
            return rows
        inputs = {name: torch.cat([t[name] for t in filled]).to(self.accelerator.device) for name in filled[0]}
        with self.accelerator.autocast():
            outputs = self._image_outputs(inputs, self.model)
        if "image_grid_thw" not in inputs or getattr(outputs, "deepstack_features", None) is not None:
            raise ValueError(
                f"`cache_images` keeps features of Qwen2.5-VL's kind only, not of {type(self.model.vlm).__name__}. "
                "Set it to False."
            )
        features = list(outputs.pooler_output)
        dtype, encoded = features[0].dtype, []
        for tensors in unpacked:
            if tensors:
                own = [features.pop(0).cpu() for _ in tensors["image_grid_thw"]]
                tensors = {k: v for k, v in tensors.items() if k != "pixel_values"}
                tensors["image_lengths"] = torch.tensor([len(f) for f in own])
                tensors["image_features"] = torch.cat(own)
            encoded.append(pack(tensors, dtype))
        return encoded

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

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        self.model_card().save(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.teacher is not None and self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            self.teacher.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.teacher is not None:
            self.teacher.load(resume_from_checkpoint)


def freeze_vision_tower(model):
    """Freezes everything of the backbone that is not its text decoder or language-model head: tower and merger."""
    core = model.model.core
    decoder = {id(parameter) for parameter in core.get_decoder().parameters()}
    for parameter in core.parameters():
        if id(parameter) not in decoder:
            parameter.requires_grad_(False)


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
