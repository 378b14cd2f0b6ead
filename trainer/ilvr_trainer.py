"""Trains latent visual reasoning: stage 1 with a momentum teacher, stage 2 through the model's own latents.

Shapes: B batch, T sequence, S spans, K latents a span, D hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import CONFIG_NAME, logging
from trl import SFTTrainer

from ilvr import ILVRConfig, ILVRProcessor
from ilvr.latent_attention import AttentionRule
from ilvr.latent_decoding import Intervention

from .alignment import alignment_statistics, alignment_term
from .ilvr_training_config import ILVRTrainingConfig
from .inputs.columns import PREPARED_COLUMNS
from .inputs.data_collator import LatentBatch, LatentDataCollator
from .inputs.data_preparation import add_tells_answer, prepare_for
from .inputs.image_features import cache_images, image_outputs, weights_key, without_pixels
from .inputs.sampler import SpanGroupedSampler
from .latent_swaps import draw_donors, swap_last_spans
from .losses import token_loss, token_statistics
from .relevance import RELEVANCES, speaking_teacher
from .running.adapters import complete_peft_config, freeze_vision_tower, ilvr_model, vision_modules
from .running.checks import check_agreement, check_batch_size, warn_of_slow_bf16
from .running.durable_trainer import DurableTrainer
from .running.loading import load_model, load_processor
from .running.optimizer_state import OptimizerStateCallback
from .running.sharding import chunks_of_all_ranks, is_sharded
from .selection import SELECTORS, Selection
from .student_inputs import StudentInputs
from .target_selection import TargetSelector, select_beforehand
from .teacher import TEACHER_FILE, MomentumTeacher, TeacherUpdateCallback
from .watching.trackers import SelectionHistogramCallback


logger = logging.get_logger(__name__)


class ILVRTrainer(DurableTrainer, SFTTrainer):
    """
    Trainer for Interleaved Latent Visual Reasoning (arXiv 2512.05665).

    Args:
        model (`str`, [`ILVRForConditionalGeneration`] or `PeftModel` over one): the student; as a string, the Hub id
            or folder of an ILVR checkpoint, or of an adapter that this trainer has saved, which is trained further.
        args ([`ILVRTrainingConfig`], *optional*).
        train_dataset, eval_dataset (`Dataset`, `IterableDataset` or, for eval, a `dict` of them):
            conversations in TRL's vision format; an image part in an assistant turn is a helper image.
        processing_class ([`ILVRProcessor`], *optional*): loaded from the model's repository if not given.
        callbacks (`list[TrainerCallback]`, *optional*): as in [`~transformers.Trainer`]; the `train_sampler` of one
            that has such draws the samples.
        peft_config (`PeftConfig`, *optional*): trains an adapter, completed by what latent spans need.
        attention_rule (`Callable`, *optional*): which columns the student may see, such as
            [`hide_images_after_first_span`]; the teacher sees all. Give `generate` the same.
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

    args: ILVRTrainingConfig
    _tag_names = ["trl", "ilvr"]
    _name = "ILVR"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: ILVRTrainingConfig | None = None,
        *,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: ILVRProcessor | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        attention_rule: AttentionRule | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or ILVRTrainingConfig("ilvr-output")
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
        check_batch_size(base_model, args, eval_dataset)
        warn_of_slow_bf16(base_model, args)
        if args.freeze_vision_tower:
            freeze_vision_tower(base_model)
        if peft_config is not None and not isinstance(model, PeftModel):
            peft_config = complete_peft_config(peft_config, model, freeze_vision=args.freeze_vision_tower)
        self.keeps_teacher = args.aligns
        self.attention_rule = attention_rule
        prepare = partial(prepare_for, processor=processing_class, args=args)
        with args.main_process_first(desc="preparation"):
            train_dataset, eval_dataset = prepare(train_dataset), _each(eval_dataset, prepare)
            if args.swap_latents:
                train_dataset = add_tells_answer(train_dataset)

        own: list[TrainerCallback] = []
        if self.keeps_teacher:
            own = [TeacherUpdateCallback(self), SelectionHistogramCallback(self)]
        if args.optimizer_state_from is not None:
            own.append(OptimizerStateCallback(self, args.optimizer_state_from))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", None)
            or LatentDataCollator(
                processing_class, cast(int | None, args.pad_to_multiple_of), helper_images=self.keeps_teacher
            ),
            callbacks=[*(callbacks or []), *own],
            peft_config=peft_config,
            **kwargs,
        )
        self.teacher: MomentumTeacher | None = None
        self.select_targets: TargetSelector | None = None
        self.student_inputs = StudentInputs(args, attention_rule, self._predict_latents, self._progress)
        if args.own_latents and is_sharded(self.accelerator):
            raise ValueError(
                "own_latents takes a forward more where rows are drawn, and the ranks of a sharded model have to run "
                "equally many. Train with DDP or ZeRO-2, or set it to 0."
            )
        if args.fixed_point_tolerance is not None and is_sharded(self.accelerator):
            raise ValueError(
                "fixed_point_tolerance takes as many forwards as a batch needs, and the ranks of a sharded model have "
                "to run equally many. Train with DDP or ZeRO-2, or with jacobi_iterations."
            )
        if self.keeps_teacher:
            asks = SELECTORS[args.selection_method].asks_teacher
            self.teacher = MomentumTeacher(self.student.model, args.teacher_decay, keeps_head=asks)
            self.select_targets = self._target_selector(self.teacher)
        if args.cache_images:
            with args.main_process_first(desc="encoding images"):
                self.train_dataset = self._cache_images(self.train_dataset)
                self.eval_dataset = _each(self.eval_dataset, lambda dataset, name: self._cache_images(dataset))
        if self.select_targets is not None and args.selection_schedule == "once":
            with args.main_process_first(desc="selecting targets"):
                self.train_dataset = self.select_once(self.train_dataset)
                self.eval_dataset = _each(self.eval_dataset, lambda dataset, name: self.select_once(dataset))

    def _target_selector(self, teacher: MomentumTeacher) -> TargetSelector:
        asks = SELECTORS[self.args.selection_method].asks_teacher
        if asks and is_sharded(self.accelerator):
            raise ValueError(
                f"selection_method={self.args.selection_method!r} lets the teacher generate, which a sharded one "
                "cannot. Train with DDP or ZeRO-2."
            )
        return TargetSelector(
            self.student.config,
            self.args,
            teacher=teacher,
            core=(self.student.model if self.args.freeze_vision_tower else teacher.model).core,
            relevance=RELEVANCES[self.args.selection_method](
                speaking_teacher(self.student, teacher), self.args.max_helper_answer_tokens
            )
            if asks
            else None,
            equal_forwards=is_sharded(self.accelerator),
        )

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*PREPARED_COLUMNS]

    def _get_train_sampler(self, train_dataset: Any = None):
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "train_sampler"):
                return callback.train_sampler
        is_sized = has_length(dataset)
        if self.args.train_sampling_strategy != "group_by_length" or not is_sized:
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.accelerator.num_processes
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        spans, lengths = (cast(Any, dataset)[column] for column in ("num_spans", "length"))
        return SpanGroupedSampler(spans, lengths, batch_size=batch_size, seed=seed)

    # ---------------------------------------------------------------------------------------------- the training step

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        batch, intervention = LatentBatch.of(inputs), None
        if self.args.swap_latents and model.training:
            batch, intervention = self._swap_latents(batch)

        # 1. Images: encoded once, shared by teacher and student while the vision tower is frozen.
        batch.inputs = inputs = self.encode_user_images(batch.inputs)
        # 2. and 3. The teacher reads the same sequences and selects the targets of each span.
        selection = None
        if self.select_targets is not None:
            with self.accelerator.autocast():
                selection = self.select_targets(batch)

        # 4. The student, with the targets in the latent positions (stage 1) or its own latents (stage 2).
        # Logits only where some row has a label, unless the caller asked for them.
        has_label = batch.shift_labels != -100  # (B, T)
        wanted = torch.ones_like(has_label[0]) if return_outputs else has_label.any(0)
        columns = wanted.nonzero().flatten()
        outputs = model(
            **inputs,
            **self.student_inputs(inputs, selection, training=model.training),
            latent_intervention=intervention,
            min_chunks=self._chunks_of_all_ranks(inputs["input_ids"]),
            jacobi_iterations=self.args.jacobi_iterations,
            jacobi_gradient_iterations=self.args.jacobi_gradient_iterations,
            fixed_point_tolerance=self.args.fixed_point_tolerance,
            logits_to_keep=columns,
            use_cache=False,
        )

        # 5. The loss and its parts.
        labels = batch.shift_labels[:, columns]
        ce = token_loss(outputs.logits, labels, num_items=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            ce = ce * self.accelerator.num_processes
        loss = self.args.ce_weight * ce if self.args.stage == 1 else ce
        if selection is not None:
            alignment, weight = self._alignment(outputs.predicted_latents, selection), self._alignment_weight()
            # Weighted, like the cross-entropy, by its share in all micro-batches and ranks of a step.
            if num_items_in_batch is not None:
                alignment = alignment * selection.mask.flatten(1).any(1).sum() / self._samples_per_rank
            loss = loss + weight * alignment
        at_once = self.args.jacobi_iterations is not None or self.args.fixed_point_tolerance is not None
        if at_once and outputs.latent_inputs is not None:
            residual = (outputs.predicted_latents - outputs.latent_inputs).norm() / outputs.latent_inputs.norm()
            self.record(outputs.latent_inputs.any(-1).sum(), latent_residual=residual)
        self.record((labels != -100).sum(), **token_statistics(outputs.logits, labels))
        spans = (inputs["input_ids"] == self.student.config.latent_start_token_id).sum(1)  # (B,)
        self.record(len(spans), spans_per_sample=spans.float().mean())
        self.record_tokens(inputs["attention_mask"].sum())
        return (loss, outputs) if return_outputs else loss

    def _swap_latents(self, batch: LatentBatch) -> tuple[LatentBatch, Intervention | None]:
        start_id = self.student.config.latent_start_token_id
        donors = draw_donors(batch, self.args.swap_latents, start_id)
        swapped = donors != torch.arange(len(donors), device=donors.device)
        self.record(len(donors), swapped_share=swapped.float().mean())
        return swap_last_spans(batch, donors, start_id) if swapped.any() else (batch, None)

    def _alignment(self, latents: torch.Tensor, selection: Selection) -> torch.Tensor:
        """The alignment loss of the predicted latents (B, S, K, D); it and what belongs to it are recorded."""
        alignment, cosine = alignment_term(latents, selection, self.args)
        self.record(selection.mask.flatten(1).any(1).sum(), alignment_loss=alignment)
        self.record(selection.mask.sum(), latent_cosine=cosine)
        for count, means in alignment_statistics(latents, selection):
            self.record(count, **means)
        return alignment

    def _alignment_weight(self) -> float:
        weight = cast(float, self.args.alignment_weight)
        if not self.args.alignment_anneal:
            return weight
        weight *= 1 - self._progress()
        self.record(1, alignment_weight=weight)
        return weight

    def _progress(self) -> float:
        """The share of the run's optimizer steps that are taken."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def _predict_latents(self, **inputs: Any) -> torch.Tensor:
        """The latents (B, S, K, D) that the student predicts."""
        with self.accelerator.autocast():
            return self.student.model(**inputs, use_cache=False).predicted_latents

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device):
        """Counts, beside the words, the samples with targets in all micro-batches of a step: their mean over ranks.

        `Trainer` hands on one number; the loss has two denominators.
        """
        start_id = self.student.config.latent_start_token_id
        count = sum((batch["input_ids"] == start_id).any(1).sum() for batch in batch_samples)
        self._samples_per_rank = torch.as_tensor(count, dtype=torch.float32, device=device)
        if self.args.average_tokens_across_devices:
            self._samples_per_rank = self.accelerator.reduce(self._samples_per_rank, "mean")
        return super()._get_num_items_in_batch(batch_samples, device)

    def _chunks_of_all_ranks(self, input_ids: torch.Tensor) -> int | None:
        if self.args.stage == 1 or not is_sharded(self.accelerator):
            return None
        if self.args.jacobi_iterations is not None:
            return 1  # the same number on all ranks, if none leaves them out
        return chunks_of_all_ranks(self.accelerator, input_ids == self.student.config.latent_pad_token_id)

    @torch.no_grad()
    def encode_user_images(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The inputs with a frozen vision tower's output in place of pixels; as they are if the tower is trained."""
        if not self.args.freeze_vision_tower:
            return inputs
        with self.accelerator.autocast():
            outputs = image_outputs(inputs, self.student.model.core)
        return inputs if outputs is None else {**without_pixels(inputs), "mm_encoder_outputs": {"image": outputs}}

    def _cache_images(self, dataset: Any) -> Dataset:
        """Features of the frozen vision tower in place of images, or, if it is trained, their processed pixels."""
        tower = [self.student.get_submodule(name) for name in vision_modules(self.student)]
        return cache_images(
            dataset,
            self.processing_class,
            encode_batch=self._encode_batch if self.args.freeze_vision_tower else None,
            dtype=torch.bfloat16 if self.args.bf16 else torch.float32,
            helper_images=self.keeps_teacher,
            key=weights_key(tower) if self.args.freeze_vision_tower else "pixels",
        )

    def _batch_of(self, rows: list[dict[str, Any]]) -> LatentBatch:
        """Rows of a prepared data set as a batch on the device, their user images encoded."""
        inputs = {name: tensor.to(self.accelerator.device) for name, tensor in self.data_collator(rows).items()}
        batch = LatentBatch.of(inputs)
        batch.inputs = self.encode_user_images(batch.inputs)
        return batch

    def select_once(self, dataset: Any) -> Dataset:
        """A prepared data set with what the model that training starts from selects."""

        @torch.no_grad()
        def select(rows: list[dict[str, Any]]) -> Selection | None:
            with self.accelerator.autocast():
                return cast(TargetSelector, self.select_targets)(self._batch_of(rows))

        return select_beforehand(dataset, select, key=[weights_key([self.student]), *self._selection_settings()])

    def _selection_settings(self) -> list[Any]:
        names = ("selection_method", "selection_top_p", "selection_temperature", "max_candidates", "unselected_slots")
        names = (*names, "helper_question", "max_helper_answer_tokens", "seed")
        return [self.student.config.latent_size, *(getattr(self.args, name) for name in names)]

    @torch.no_grad()
    def measure_latent_norm(self) -> None:
        """Under `latent_head="rescale"`, sets the norm of latents to the mean norm of the targets of 64 samples.

        Before the first step of stage 1, when engines have put the weights where they compute; a run that goes on
        reads it from its checkpoint.
        """
        config, dataset = self.student.config, cast(Any, self.train_dataset)
        if self.args.stage != 1 or config.latent_head != "rescale":
            return
        if isinstance(dataset, Dataset):
            numbers = [i for i, count in enumerate(dataset["num_spans"]) if count][:64]
            rows = [dataset[i] for i in numbers]
        else:
            rows = list(islice((row for row in islice(dataset, 512) if row["num_spans"]), 64))
        if not rows:
            raise ValueError(
                "latent_head='rescale' measures the features of helper images, and the first 512 samples have none. "
                "Shuffle the data, or start the model with latent_head='identity'."
            )
        norms = []
        for start in range(0, len(rows), 16):
            with self.accelerator.autocast():
                selection = cast(TargetSelector, self.select_targets)(self._batch_of(rows[start : start + 16]))
            norms.append(cast(Selection, selection).targets.norm(dim=-1)[cast(Selection, selection).mask])
        config.latent_norm = float(torch.cat(norms).mean())

    @torch.no_grad()
    def _encode_batch(self, inputs: dict[str, torch.Tensor]):
        with self.accelerator.autocast():
            inputs = {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}
            return image_outputs(inputs, self.student.model.core)

    # ----------------------------------------------------------------------------------- what the method adds to a run

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.teacher is not None and self.model.training:
            logs["teacher_distance"] = self.teacher.distance(self.student.model)
        super().log(logs, start_time)
        if logs.get("target_similarity", 0) > 0.99:
            logger.warning_once(
                "The targets of the alignment loss are nearly all alike (mean cosine above 0.99): a cosine loss is "
                "then satisfied by their common direction. Freeze the vision tower if it is trained, and check that "
                "the backbone can tell the helper images apart."
            )
        if self.args.stage == 1 and not 0.5 < logs.get("latent_norm_ratio", 1) < 2:
            logger.warning_once(
                f"What the model would feed back is {logs['latent_norm_ratio']:.3g} times as long as what stage 1 "
                "feeds it: inference will differ from training. Start the model with latent_head='rescale'."
            )
        if self.args.jacobi_iterations is not None and logs.get("latent_residual", 0) > 0.1:
            logger.warning_once(
                f"One more iteration would change the latents by {logs['latent_residual']:.2g} of their length: what "
                f"jacobi_iterations={self.args.jacobi_iterations} trains is not what generate feeds, and may undo "
                "what they say. Raise it, at most to the number of latents of a sample, or leave it out."
            )

    def save_method_state(self, folder: str) -> None:
        if self.teacher is not None:
            self.teacher.save(folder, self.args.should_save)
        if self.args.should_save:
            self.student.config.save_pretrained(folder)  # which sharded checkpoints do not hold otherwise

    def load_method_state(self, folder: str) -> None:
        if self.teacher is not None:
            self.teacher.load(folder)
        self.student.config.latent_norm = ILVRConfig.from_pretrained(folder).latent_norm  # measured at the first step

    def method_files(self) -> list[str]:
        return [CONFIG_NAME] if self.teacher is None else [TEACHER_FILE, CONFIG_NAME]

    def run_settings(self) -> dict[str, Any]:
        return {"stage": self.args.stage, "attention_rule": self._rule_name(), **super().run_settings()}

    def _rule_name(self) -> str | None:
        return getattr(self.attention_rule, "__name__", None)

    def card_settings(self) -> dict[str, Any]:
        args = self.args
        given = {
            "attention rule": self._rule_name(),
            "image dropout": args.image_dropout and f"{args.image_dropout}, {args.image_dropout_schedule}",
            "own latents": args.own_latents,
            "swapped latents": args.swap_latents,
        }
        given = {name: value for name, value in given.items() if value}
        if not args.aligns:
            return {"stage": 2, **given}
        selection = args.selection_method
        if selection == "query_top_p":
            selection += f", top-p {args.selection_top_p}, tau {args.selection_temperature}"
        return {
            "stage": args.stage,
            "teacher decay": args.teacher_decay,
            "selection": selection,
            "latent head": self.student.config.latent_head,
            "loss": f"{args.ce_weight if args.stage == 1 else 1.0} CE + {args.alignment_weight} alignment "
            f"({args.alignment}{', annealed' if args.alignment_anneal else ''})",
            **given,
        }


def _each(datasets: Any, change: Callable) -> Any:
    """What `change(dataset, name=…)` makes of an evaluation data set, or of each in a dict of them."""
    if isinstance(datasets, dict):
        return {name: change(dataset, name=name) for name, dataset in datasets.items()}
    return None if datasets is None else change(datasets, name="eval")
