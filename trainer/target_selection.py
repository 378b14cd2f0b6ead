"""Targets of the latents: what is selected in the helper images of a batch, for trainer, pictures and audits alike.

Shapes: B batch, T sequence, S spans, K latents a span, N candidates of a picture, D hidden.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher

from .ilvr_training_config import ILVRTrainingConfig
from .inputs.columns import FOLLOWED_PATCHES, HELPER_ANSWERS, HELPER_PROMPTS, TARGET_INDICES, side_by_side
from .inputs.data_collator import LatentBatch
from .inputs.image_features import flatten_features, image_outputs
from .selection import (
    SELECTORS,
    Queries,
    Selection,
    SelectionInputs,
    SpanSelection,
    fill_slots,
    global_query,
    group_candidates,
    masked_mean,
    pad_candidates,
    span_text_masks,
)


def select_beforehand(
    dataset: Any, select: Callable[[list[dict[str, Any]]], Selection | None], *, key: list[Any]
) -> Dataset:
    """Selects the targets of a whole data set, and keeps which candidates they are.

    Args:
        dataset (`Dataset`): of [`prepare_dataset`].
        select (`Callable`): what is selected for some of its rows.
        key (`list`): all that the selection follows from beside the data; an earlier one with the same is taken again.

    Returns:
        `Dataset`: with a column of `TARGET_INDICES`, for each span those of its targets.

    Raises:
        ValueError: for a streaming data set.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError("selection_schedule='once' needs all data at hand; set it to 'step' for a stream.")
    if TARGET_INDICES in dataset.column_names:
        return dataset

    def selected(rows: dict[str, list]) -> dict[str, list]:
        examples = [dict(zip(rows, values)) for values in zip(*rows.values())]
        selection = select(examples)
        found = [] if selection is None else selection.indices.where(selection.mask, -1).tolist()
        spans = [row[: example["num_spans"]] for row, example in zip(found or [[]] * len(examples), examples)]
        return {TARGET_INDICES: [[[i for i in span if i >= 0] for span in row] for row in spans]}

    added = dataset.map(
        selected,
        batched=True,
        batch_size=64,
        remove_columns=dataset.column_names,
        features=Features({TARGET_INDICES: List(List(Value("int32")))}),
        new_fingerprint=Hasher.hash([dataset._fingerprint, key]),  # hashing the function would pickle the model
        desc="Selecting targets",
    )
    asked = [column for column in (HELPER_PROMPTS, HELPER_ANSWERS) if column in dataset.column_names]
    return side_by_side(dataset.remove_columns(asked), added)


class TargetSelector:
    """Selects the targets of each span of a batch, by `args.selection_method`.

    Args:
        config ([`ILVRConfig`]): of the model.
        args ([`ILVRTrainingConfig`]): names the method and its settings.
        teacher (`Callable`): the model whose hidden states ask, as [`MomentumTeacher`]; called like [`ILVRModel`].
        relevance (`Callable`, *optional*): an [`AnswerRelevance`], for selectors that ask the teacher about pictures.
        core (`PreTrainedModel`): the backbone whose vision tower encodes the pictures.
        equal_forwards (`bool`, *optional*, defaults to `False`): whether the teacher runs for batches without spans,
            too, because other ranks gather its weights from this one.
    """

    def __init__(
        self,
        config: Any,
        args: ILVRTrainingConfig,
        *,
        teacher: Callable,
        core: Any,
        relevance: Callable | None = None,
        equal_forwards: bool = False,
    ) -> None:
        self.config, self.args = config, args
        self.teacher, self.core, self.equal_forwards = teacher, core, equal_forwards
        self.relevance = relevance
        self.selector = SELECTORS[args.selection_method]

    @torch.no_grad()
    def __call__(self, batch: LatentBatch) -> Selection | None:
        """Selects the targets of a batch.

        Args:
            batch ([`LatentBatch`]): its user images may be encoded already, as `mm_encoder_outputs`.

        Returns:
            [`Selection`], or `None` for a batch without spans.
        """
        inputs = batch.inputs
        counts = (inputs["input_ids"] == self.config.latent_start_token_id).sum(1)  # (B,): spans of each row
        num_spans = int(counts.max())
        if not num_spans:
            if self.selector.reads_teacher and self.equal_forwards and batch.target_indices is None:
                self._teacher_states(inputs, num_spans)
            return None
        outputs = image_outputs(batch.helper_inputs, self.core)
        pictures = flatten_features(outputs.pooler_output).float().split(batch.helper_inputs["image_lengths"].tolist())
        candidates, candidate_mask = self._laid_out(pictures, counts)
        followed = self._followed(batch.helper_inputs, counts)
        if batch.target_indices is not None:
            return self._selected_before(batch.target_indices, candidates, candidate_mask, followed)
        relevance = followed.float() if self.selector.reads_followed and followed is not None else None
        if self.selector.asks_teacher:
            assert self.relevance is not None
            relevance = self._of_patches(self.relevance(batch.helper_inputs, outputs), counts)
        looked_at = SelectionInputs(
            candidates,
            candidate_mask,
            max_selected=self.config.latent_size,
            top_p=self.args.selection_top_p,
            temperature=self.args.selection_temperature,
            relevance=relevance,
            queries=self._queries(inputs, batch.assistant_mask, num_spans) if self.selector.reads_teacher else None,
            encode_user_pictures=partial(self._user_pictures, batch),
        )
        spans: list[SpanSelection] = []
        for span in range(num_spans):
            spans.append(self.selector.select(looked_at, span, spans[-1] if spans else None))
        if self.args.unselected_slots == "repeat":
            spans = [fill_slots(selected) for selected in spans]
        return Selection(*(torch.stack(parts, dim=1) for parts in zip(*spans)), candidates, candidate_mask, followed)

    def _laid_out(self, pictures: Sequence[torch.Tensor], counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is known of each patch of the helper images, in groups, by row and span: (B, S, N, D), and a mask."""
        return pad_candidates([group_candidates(own, self.args.max_candidates) for own in pictures], counts)

    def _of_patches(self, pictures: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
        """A number for each patch (N,) of the helper images, as one for each candidate: (B, S, N)."""
        return self._laid_out([patches.unsqueeze(-1) for patches in pictures], counts)[0].squeeze(-1)

    def _followed(self, helper_inputs: dict[str, torch.Tensor], counts: torch.Tensor) -> torch.Tensor | None:
        """The candidate (B, S, N) of each helper image that holds the patch which the data says is followed."""
        patches = helper_inputs.get(FOLLOWED_PATCHES)  # (helper images,), -1 where nothing is said
        if patches is None:
            return None
        lengths = helper_inputs["image_lengths"]
        if (patches >= lengths).any():
            image = int((patches >= lengths).nonzero()[0])
            raise ValueError(
                f"Helper image {image} of a batch has {int(lengths[image])} patches, and `followed` in its row's "
                f"metadata names patch {int(patches[image])}. Count them from 0, in raster order, after the merger."
            )
        marks = [torch.arange(n, device=patches.device) == i for n, i in zip(lengths.tolist(), patches)]
        return self._of_patches([mark.float() for mark in marks], counts) > 0

    def _selected_before(
        self,
        indices: torch.Tensor,
        candidates: torch.Tensor,
        candidate_mask: torch.Tensor,
        followed: torch.Tensor | None,
    ) -> Selection:
        """The candidates of `indices` (B, S, K), -1 for none."""
        mask = indices >= 0
        indices = indices.clamp(min=0)
        chosen = candidates.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, candidates.shape[-1]))
        return Selection(chosen * mask.unsqueeze(-1), mask, indices, None, candidates, candidate_mask, followed)

    def _user_pictures(self, batch: LatentBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates (B, N, D) of each row's last user image, and their mask; none exist in a row without images."""
        encoded: Any = batch.inputs.get("mm_encoder_outputs")
        has_image = batch.images_per_row > 0
        outputs = image_outputs(batch.inputs, self.core) if encoded is None else encoded["image"]
        pictures = flatten_features(outputs.pooler_output).float().split(batch.image_lengths.tolist())
        last = (batch.images_per_row.cumsum(0) - 1)[has_image].tolist()
        groups = [group_candidates(pictures[i], self.args.max_candidates) for i in last]
        candidates, mask = pad_candidates(groups, has_image.long())  # (B, 1, N, D)
        return candidates[:, 0], mask[:, 0]

    def _queries(self, inputs: dict, assistant_mask: torch.Tensor, num_spans: int) -> Queries:
        input_ids, config = inputs["input_ids"], self.config
        hidden = self._teacher_states(inputs, num_spans)
        is_image = input_ids == config.image_token_id
        prompt = inputs["attention_mask"].bool() & ~assistant_mask & (assistant_mask.cumsum(1) == 0)
        text_masks = span_text_masks(input_ids, assistant_mask, config.latent_token_ids, num_spans)
        return Queries(
            whole=global_query(hidden, prompt & ~is_image, prompt & is_image),
            text=masked_mean(hidden.unsqueeze(1), text_masks),
            has_text=text_masks.any(-1),
        )

    def _teacher_states(self, inputs: dict, num_spans: int) -> torch.Tensor:
        """The teacher's last-layer hidden states (B, T, D), fp32; latent positions keep the embedding of the pad."""
        shape = (len(inputs["input_ids"]), num_spans, self.config.latent_size)
        unused = torch.zeros(*shape, self.config.get_text_config().hidden_size, device=inputs["input_ids"].device)
        outputs = self.teacher(**inputs, latent_values=unused, latent_mask=unused[..., 0].bool(), use_cache=False)
        return outputs.last_hidden_state.float()
