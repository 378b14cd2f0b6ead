"""Targets of the latents: what is selected in the helper images of a batch, for trainer, pictures and audits alike.

Shapes: B batch, T sequence, S spans, K latents a span, N candidates of a picture, D hidden.
"""

from collections.abc import Callable
from functools import partial

import torch

from ilvr import ILVRConfig

from .ilvr_training_config import ILVRTrainingConfig
from .inputs.image_features import flatten_features, image_outputs
from .selection import (
    SELECTORS,
    Queries,
    Selection,
    SelectionInputs,
    SpanSelection,
    global_query,
    group_candidates,
    masked_mean,
    pad_candidates,
    span_text_masks,
)


class TargetSelector:
    """Selects the targets of each span of a batch, by `args.selection_method`.

    Args:
        config ([`ILVRConfig`]): of the model.
        args ([`ILVRTrainingConfig`]): names the method and its settings.
        teacher (`Callable`): the model whose hidden states ask, as [`MomentumTeacher`]; called like [`ILVRModel`].
        core (`PreTrainedModel`): the backbone whose vision tower encodes the pictures.
        equal_forwards (`bool`, *optional*, defaults to `False`): whether the teacher runs for batches without spans,
            too, because other ranks gather its weights from this one.
    """

    def __init__(
        self,
        config: ILVRConfig,
        args: ILVRTrainingConfig,
        *,
        teacher: Callable,
        core: torch.nn.Module,
        equal_forwards: bool = False,
    ):
        self.config, self.args = config, args
        self.teacher, self.core, self.equal_forwards = teacher, core, equal_forwards
        self.selector = SELECTORS[args.selection_method]

    @torch.no_grad()
    def __call__(
        self,
        inputs: dict,
        helper_inputs: dict,
        assistant_mask: torch.Tensor,
        image_lengths: torch.Tensor | None = None,
        images_per_row: torch.Tensor | None = None,
    ) -> Selection | None:
        """Selects the targets of a batch.

        Args:
            inputs (`dict`): the model's inputs for the sequences, (B, T).
            helper_inputs (`dict`): image tensors of the helper images, in the order of the spans.
            assistant_mask (`torch.BoolTensor` of shape `(B, T)`): tokens of the assistant's turns.
            image_lengths (`torch.LongTensor` of shape `(images,)`): tokens of each of the user's images.
            images_per_row (`torch.LongTensor` of shape `(B,)`): how many of them each row has.

        Returns:
            [`Selection`], or `None` for a batch without spans.
        """
        counts = (inputs["input_ids"] == self.config.latent_start_token_id).sum(1)  # (B,): spans of each row
        num_spans = int(counts.max())
        if not num_spans:
            if self.selector.reads_teacher and self.equal_forwards:
                self._teacher_states(inputs, num_spans)
            return None
        candidates, candidate_mask = self._candidates(helper_inputs, counts)
        looked_at = SelectionInputs(
            candidates,
            candidate_mask,
            max_selected=self.config.latent_size,
            top_p=self.args.selection_top_p,
            temperature=self.args.selection_temperature,
            queries=self._queries(inputs, assistant_mask, num_spans) if self.selector.reads_teacher else None,
            encode_user_pictures=partial(self._user_pictures, inputs, image_lengths, images_per_row),
        )
        spans: list[SpanSelection] = []
        for span in range(num_spans):
            spans.append(self.selector.select(looked_at, span, spans[-1] if spans else None))
        return Selection(*(torch.stack(parts, dim=1) for parts in zip(*spans)), candidates, candidate_mask)

    def _candidates(self, helper_inputs: dict, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates of the helper images of each row, (B, S, N, D), and their mask."""
        features = flatten_features(image_outputs(helper_inputs, self.core).pooler_output).float()
        pictures = features.split(helper_inputs["image_lengths"].tolist())
        return pad_candidates([group_candidates(own, self.args.max_candidates) for own in pictures], counts)

    def _user_pictures(
        self, inputs: dict, image_lengths: torch.Tensor, images_per_row: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates (B, N, D) of each row's last user image, and their mask; none exist in a row without images."""
        encoded = inputs.get("mm_encoder_outputs")
        outputs = image_outputs(inputs, self.core) if encoded is None else encoded["image"]
        pictures = flatten_features(outputs.pooler_output).float().split(image_lengths.tolist())
        last = (images_per_row.cumsum(0) - 1)[images_per_row > 0].tolist()
        groups = [group_candidates(pictures[i], self.args.max_candidates) for i in last]
        candidates, mask = pad_candidates(groups, (images_per_row > 0).long())  # (B, 1, N, D)
        return candidates[:, 0], mask[:, 0]

    def _queries(self, inputs: dict, assistant_mask: torch.Tensor, num_spans: int) -> Queries:
        input_ids, config = inputs["input_ids"], self.config
        hidden = self._teacher_states(inputs, num_spans)
        is_image = input_ids == config.image_token_id
        prompt = inputs["attention_mask"].bool() & ~assistant_mask & (assistant_mask.cumsum(1) == 0)
        latent_ids = (config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id)
        text_masks = span_text_masks(input_ids, assistant_mask, latent_ids, num_spans)
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
