"""Arguments of `ILVRTrainer`."""

import warnings
from dataclasses import dataclass, field
from typing import Any, cast

from trl import SFTConfig

from .selection import SELECTORS


# By stage: the paper's, and a fiftieth of it (ours). Cross-entropy through the model's own latents multiplies errors
# over the latents, and has no reason to return to latents that have failed.
LEARNING_RATES = {1: 1e-5, 2: 2e-7}


@dataclass
class ILVRTrainingConfig(SFTConfig):
    r"""
    Configuration of [`ILVRTrainer`]. All arguments of [`~trl.SFTConfig`] apply; those named here are added, or have
    another default. Defaults are the paper's (arXiv 2512.05665, section 4.1) unless a line says otherwise.

    Args:
        > What is trained

        stage (`int`, *optional*, defaults to 1):
            1 aligns the latents with features that a momentum teacher selects from the helper images; 2 trains through
            the model's own latents with cross-entropy, alone unless `alignment_weight` is given. Samples without
            helper images train as text in stage 2.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Whether the vision tower and merger stay as they are.
        cache_images (`bool`, *optional*, defaults to `False`):
            Whether each image is processed once, before training. What is kept is the output of the vision tower while
            it is frozen, and the processed pixels otherwise. Not the paper's; saves time where it fits in memory.

        > Stage 1: teacher and selection

        teacher_decay (`float`, *optional*, defaults to 0.999):
            Momentum of the teacher.
        selection_method (`str`, *optional*, defaults to `"query_top_p"`):
            How targets are selected: `"query_top_p"` (paper), `"answer_gradient"` (what the teacher's own answer to
            `helper_question` depends on; ours), `"answer_occlusion"` (what that answer loses when a patch is hidden;
            ours, dearer), `"attention"` (what it attends to; ours, cheaper, needs `attn_implementation="eager"`),
            `"change"` (what differs from the picture before; ours), `"mean_pool"` (as Mirage), `"uniform"` or
            `"random"`; `"followed"` is an oracle for tasks that know the right patch (`followed` in a row's
            `metadata`): an upper bound, not a method.
        selection_schedule (`str`, *optional*, defaults to `"step"`):
            When they are selected: at each `"step"`, by the moving teacher, or `"once"`, before training, by the model
            that it starts from.
        helper_question (`str`, *optional*, defaults to `None`):
            What `"answer_gradient"`, `"answer_occlusion"` and `"attention"` ask of each helper image, unless a row's
            `metadata` has `helper_questions`. With neither, what the trace says after the picture is the answer, and
            `"answer_occlusion"` refuses.
        max_helper_answer_tokens (`int`, *optional*, defaults to 8):
            At which the teacher's own answers are cut; what a trace says is not.
        unselected_slots (`str`, *optional*, defaults to `"repeat"`):
            What stage 1 puts into the latents behind the selected ones: the last target again (ours), so that each
            slot holds a latent, as in inference; or with `"pad"` the embedding of `<|latent_pad|>` (paper), which
            inference never feeds.
        selection_top_p (`float`, *optional*, defaults to 0.9):
            Probability mass that the selected features hold.
        selection_temperature (`float`, *optional*, defaults to 0.05):
            Temperature of the softmax over cosines. The paper's is 1.0, at which top-p never binds.
        max_candidates (`int`, *optional*, defaults to 256):
            Groups that the features of a helper image are averaged into.

        > Against latents that are not used

        image_dropout (`float`, *optional*, defaults to 0.0):
            Share of rows that may not look at their images after the first span, in both stages (LIVR, arXiv
            2512.21218; CVRR, 2609.06746). In inference, `generate(attention_rule=hide_images_after_first_span)`.
        image_dropout_schedule (`str`, *optional*, defaults to `"constant"`):
            Whether that share is `"constant"`, or grows over the run from 0 by a `"linear"` schedule.
        own_latents (`float`, *optional*, defaults to 0.0):
            Share of rows in stage 1, growing over the run from 0, that are fed the latents which the model predicts,
            as in inference, in place of targets (scheduled sampling, arXiv 1506.03099). Takes a forward more.
        swap_latents (`float`, *optional*, defaults to 0.0):
            Probability with which stage 2 gives a row the last span of another row of the batch, and trains it on the
            answer that follows (ours; interchange interventions, arXiv 2112.00826). For rows whose `metadata` says
            `tells_answer`: the words after the last span follow from its latents alone.

        > Loss

        ce_weight (`float`, *optional*, defaults to 1.0):
            Weight of the cross-entropy over words and span markers.
        alignment_weight (`float`, *optional*, defaults to `None`):
            Weight of the alignment loss; `None`: 1.0 in stage 1, 0.0 in stage 2 (paper). With more, stage 2 aligns the
            model's own latents with targets selected as in stage 1, and needs helper images and a teacher, too.
        alignment_anneal (`bool`, *optional*, defaults to `False`):
            Whether that weight falls to 0 over the run, linearly.
        alignment (`str`, *optional*, defaults to `"cosine"`):
            The alignment loss: `"cosine"` (paper); `"infonce"`, by which each latent picks its target among the other
            candidates of its helper image and the targets of other rows; or `"centred"` (ours), the cosine after the
            mean feature of the batch's helper images has been subtracted from both, for latents of the features' size
            (`latent_head="rescale"`).
        alignment_temperature (`float`, *optional*, defaults to 0.1):
            Temperature of `"infonce"`. Not the paper's.
        alignment_noise (`float`, *optional*, defaults to 0.01):
            Standard deviation of the noise added to the targets of the alignment loss.

        > Stage 2: what stage 1 learned

        optimizer_state_from (`str`, *optional*, defaults to `None`):
            A checkpoint of stage 1, or its folder, whose newest whole checkpoint is taken: its AdamW moments and step
            counts are this run's first. Learning rate and schedule are this run's own.

        > Stage 2: latents in parallel

        jacobi_iterations (`int`, *optional*, defaults to `None`):
            Computes all latents of a sequence at once, by this many forwards that each refine them all. `None`: one
            after the other, as the paper. The log's `latent_residual` tells what is left to refine.
        jacobi_gradient_iterations (`int`, *optional*, defaults to `None`):
            Through how many of the last of these the gradient flows. `None`: all.
        fixed_point_tolerance (`float`, *optional*, defaults to `None`):
            Computes all latents of a sequence as the fixed point of one forward, and its gradient by implicit
            differentiation, each until a term changes it by less than this, relative. Equal to one after the other up
            to that; how much sooner depends on the model. 1e-4 is a good first value.

    > [!NOTE]
    > Defaults that differ from [`~trl.SFTConfig`]: `learning_rate` `None` (1e-5 in stage 1, 2e-7 in stage 2: at stage
    > 1's rate a small model lost its latents within fifty steps, at a fiftieth they got better), `weight_decay` 0.01,
    > `num_train_epochs` 15, `per_device_train_batch_size` 1, `gradient_accumulation_steps` 8, `max_grad_norm`
    > 1.0, `max_length` `None` (no sequence is ever cut: samples longer than `max_length` are dropped and listed),
    > `remove_unused_columns` `False`.
    > `train_sampling_strategy="group_by_length"` groups samples by spans and length in batches of random order.
    """

    # TRL's may be `None`, and is then set.
    output_dir: str = field(  # ty: ignore[incompatible-mutable-override]
        default="ilvr-output", metadata={"help": "Folder of checkpoints and of the final model."}
    )
    learning_rate: float | None = field(  # ty: ignore[incompatible-attribute-override]
        default=None, metadata={"help": "The initial learning rate for AdamW. Default: 1e-5 in stage 1, 2e-7 in 2."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay for AdamW."})
    num_train_epochs: float = field(default=15.0, metadata={"help": "Total number of training epochs."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Batch size per device."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Micro-batches per optimizer step."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest sequence kept, in tokens. Longer samples are dropped before training, and listed."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads the data set's own columns."}
    )

    stage: int = field(default=1, metadata={"help": "1: alignment with a momentum teacher. 2: own latents, CE only."})
    freeze_vision_tower: bool = field(
        default=True, metadata={"help": "Whether the vision tower and merger are frozen."}
    )
    cache_images: bool = field(
        default=False, metadata={"help": "Whether to process each image once and keep the result."}
    )

    teacher_decay: float = field(default=0.999, metadata={"help": "Momentum of the teacher."})
    selection_method: str = field(
        default="query_top_p",
        metadata={"help": "How targets are selected from a helper image.", "choices": list(SELECTORS)},
    )
    selection_schedule: str = field(
        default="step", metadata={"help": "When targets are selected.", "choices": ["step", "once"]}
    )
    helper_question: str | None = field(
        default=None, metadata={"help": "What answer_… and attention ask of each helper image; without, the trace."}
    )
    max_helper_answer_tokens: int = field(default=8, metadata={"help": "At which its answers are cut."})
    unselected_slots: str = field(
        default="repeat",
        metadata={"help": "What is in the latents behind the selected ones.", "choices": ["repeat", "pad"]},
    )
    selection_top_p: float = field(default=0.9, metadata={"help": "Probability mass of the selected features."})
    selection_temperature: float = field(default=0.05, metadata={"help": "Softmax temperature over the cosines."})
    max_candidates: int = field(default=256, metadata={"help": "Feature groups per helper image."})

    image_dropout: float = field(
        default=0.0, metadata={"help": "Share of rows that may not look at their images after the first span."}
    )
    image_dropout_schedule: str = field(
        default="constant", metadata={"help": "How that share goes over the run.", "choices": ["constant", "linear"]}
    )
    own_latents: float = field(
        default=0.0, metadata={"help": "Share of rows that stage 1 feeds the model's own latents by the end of a run."}
    )
    swap_latents: float = field(
        default=0.0, metadata={"help": "Share of rows that stage 2 gives another row's last span, and its answer."}
    )

    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy."})
    alignment_weight: float | None = field(
        default=None, metadata={"help": "Weight of the alignment loss. Default: 1.0 in stage 1, 0.0 in stage 2."}
    )
    alignment_anneal: bool = field(
        default=False, metadata={"help": "Whether the weight of the alignment loss falls to 0 over the run."}
    )
    alignment: str = field(
        default="cosine", metadata={"help": "The alignment loss.", "choices": ["cosine", "infonce", "centred"]}
    )
    alignment_temperature: float = field(default=0.1, metadata={"help": "Temperature of the InfoNCE alignment."})
    alignment_noise: float = field(default=0.01, metadata={"help": "Noise added to the alignment targets."})

    optimizer_state_from: str | None = field(
        default=None, metadata={"help": "Checkpoint or folder of stage 1 whose AdamW moments this run starts with."}
    )

    jacobi_iterations: int | None = field(
        default=None, metadata={"help": "Refines all latents at once, this many times. Default: one after the other."}
    )
    jacobi_gradient_iterations: int | None = field(
        default=None, metadata={"help": "Iterations, the last ones, that the gradient flows through. Default: all."}
    )
    fixed_point_tolerance: float | None = field(
        default=None,
        metadata={"help": "Computes all latents as a fixed point, to this relative precision, gradients included."},
    )

    def __post_init__(self):
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES.get(self.stage, LEARNING_RATES[1])
        if self.alignment_weight is None:
            self.alignment_weight = 0.0 if self.stage == 2 else 1.0
        with warnings.catch_warnings():
            # TRL sets `gradient_checkpointing`, transformers has renamed it: nothing a user can act on.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
            super().__post_init__()
        if self.stage not in (1, 2):
            raise ValueError(f"`stage` must be 1 (alignment) or 2 (relaxation), got {self.stage}.")
        if self.selection_method not in SELECTORS:
            raise ValueError(f"`selection_method` must be one of {list(SELECTORS)}, got {self.selection_method!r}.")
        if self.selection_schedule not in ("step", "once") or self.unselected_slots not in ("pad", "repeat"):
            raise ValueError(
                "`selection_schedule` must be 'step' or 'once' and `unselected_slots` 'pad' or 'repeat', got "
                f"{self.selection_schedule!r} and {self.unselected_slots!r}."
            )
        if self.selection_schedule == "once" and not SELECTORS[self.selection_method].keeps_candidates:
            raise ValueError(
                f"`selection_schedule='once'` keeps which candidates are targets, and {self.selection_method!r} makes "
                "new ones. Set it to 'step'."
            )
        if self.max_helper_answer_tokens < 1:
            raise ValueError(f"`max_helper_answer_tokens` must be at least 1, got {self.max_helper_answer_tokens}.")
        if not 0 <= self.teacher_decay < 1:
            raise ValueError(f"`teacher_decay` must lie in [0, 1), got {self.teacher_decay}.")
        if not 0 < self.selection_top_p <= 1 or self.selection_temperature <= 0:
            raise ValueError(
                "`selection_top_p` must lie in (0, 1] and `selection_temperature` above 0, got "
                f"{self.selection_top_p} and {self.selection_temperature}."
            )
        if self.alignment not in ("cosine", "infonce", "centred") or self.alignment_temperature <= 0:
            raise ValueError(
                "`alignment` must be 'cosine', 'infonce' or 'centred' and `alignment_temperature` above 0, got "
                f"{self.alignment!r} and {self.alignment_temperature}."
            )
        if self.alignment_weight < 0 or (self.alignment_anneal and not self.alignment_weight):
            raise ValueError(
                "`alignment_weight` must be at least 0, and above it with `alignment_anneal`, got "
                f"{self.alignment_weight} with alignment_anneal={self.alignment_anneal}."
            )
        if self.max_candidates < 1:
            raise ValueError(f"`max_candidates` must be at least 1, got {self.max_candidates}.")
        iterations, gradient_iterations = self.jacobi_iterations, self.jacobi_gradient_iterations
        if iterations is not None and (self.stage == 1 or iterations < 1):
            raise ValueError(f"`jacobi_iterations` is for stage 2 and at least 1, got {iterations}.")
        if gradient_iterations is not None and not 0 <= gradient_iterations <= (iterations or -1):
            raise ValueError(
                f"`jacobi_gradient_iterations` must lie between 0 and `jacobi_iterations`, got {gradient_iterations} "
                f"and {iterations}."
            )
        tolerance = self.fixed_point_tolerance
        if tolerance is not None and (self.stage == 1 or tolerance < 0 or iterations is not None):
            raise ValueError(
                "`fixed_point_tolerance` is for stage 2, at least 0, and takes the place of `jacobi_iterations`, got "
                f"{tolerance} in stage {self.stage} with jacobi_iterations={iterations}."
            )
        if self.packing or self.padding_free:
            raise ValueError("`packing` and `padding_free` would mix the spans of samples; set both to False.")
        if not 0 <= self.image_dropout <= 1 or self.image_dropout_schedule not in ("constant", "linear"):
            raise ValueError(
                "`image_dropout` must lie in [0, 1] and `image_dropout_schedule` be 'constant' or 'linear', got "
                f"{self.image_dropout} and {self.image_dropout_schedule!r}."
            )
        if not 0 <= self.own_latents <= 1 or (self.own_latents and self.stage != 1):
            raise ValueError(
                "`own_latents` must lie in [0, 1], and is for stage 1: stage 2 is fed nothing else. Got "
                f"{self.own_latents} in stage {self.stage}."
            )
        if self.swap_latents:
            self._check_swap_latents()
        # The trainer prepares the data itself; TRL's own preparation knows nothing of latent spans.
        given = cast(dict[str, Any], self.dataset_kwargs or {})  # TRL has parsed the string of a command line
        self.dataset_kwargs = {**given, "skip_prepare_dataset": True}

    def _check_swap_latents(self) -> None:
        if not 0 <= self.swap_latents < 1:
            raise ValueError(
                f"`swap_latents` must lie in [0, 1), got {self.swap_latents}: some rows have to be donors."
            )
        cannot = {
            f"`stage={self.stage}`: stage 1 feeds targets. Set stage=2": self.stage != 2,
            "`jacobi_iterations`: latents are swapped one after the other. Leave it out": self.jacobi_iterations,
            "`fixed_point_tolerance`: latents are swapped one after the other. Leave it out": (
                self.fixed_point_tolerance is not None
            ),
            "`alignment_weight`: targets are the row's own. Set it to 0": self.alignment_weight,
            "a batch of 1, which has no other row. Raise per_device_train_batch_size": (
                self.per_device_train_batch_size < 2
            ),
        }
        for reason, holds in cannot.items():
            if holds:
                raise ValueError(f"`swap_latents={self.swap_latents}` does not go with {reason}.")

    @property
    def aligns(self) -> bool:
        """Whether latents are aligned with targets, so that a teacher selects some: in stage 1, and in stage 2 on
        request."""
        return self.stage == 1 or bool(self.alignment_weight)
