"""Latent spans as tensors: where they stand in sequences, and what of them travels on the cache of a generation.

A *column* is a place of the sequence, the same in all rows. `is_latent` says where `<|latent_pad|>` stands. A *chunk*
is a run of columns that are computed in one forward.

B batch (times beams), T sequence, S spans, K latents a span, D hidden.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.generation.utils import _slice_mm_encoder_output


def gather_spans(values: torch.Tensor, is_latent: torch.Tensor, num_spans: int, latent_size: int) -> torch.Tensor:
    """Collects what stands at the latent positions of each row.

    Args:
        values (`torch.Tensor` of shape `(B, T, D)`): a vector for each column.
        is_latent (`torch.BoolTensor` of shape `(B, T)`): where `<|latent_pad|>` stands.
        num_spans (`int`): S, the largest number of spans in a row.
        latent_size (`int`): K.

    Returns:
        `torch.Tensor` of shape `(B, S, K, D)`: zeros for the spans that a row does not have.
    """
    batch_size, _, hidden_size = values.shape
    rows, columns = is_latent.nonzero(as_tuple=True)
    slots = (is_latent.cumsum(1) - 1)[rows, columns]
    spans = values.new_zeros(batch_size, num_spans * latent_size, hidden_size)
    return spans.index_put((rows, slots), values[rows, columns]).view(batch_size, num_spans, latent_size, hidden_size)


def pad_spans(latents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `generate(output_latents=True)` returns, as a forward pass takes it: to replay latents or to swap them.

    Args:
        latents (`list[torch.Tensor]`): for each row the latents (S, K, D) of its spans.

    Returns:
        `tuple`: `latent_values` (B, S, K, D), zero in the spans that a row does not have, and `latent_mask` (B, S, K).
    """
    values = torch.nn.utils.rnn.pad_sequence(latents, batch_first=True)
    counts = torch.tensor([len(row) for row in latents], device=values.device)
    exists = torch.arange(values.shape[1], device=values.device) < counts.unsqueeze(1)  # (B, S)
    return values, exists.unsqueeze(-1).expand(values.shape[:3])


def is_forced(input_ids: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Which ids of a generation were no decision of the model, (B, T): the pads of a span and its end."""
    _, pad_id, end_id = config.latent_token_ids
    return (input_ids == pad_id) | (input_ids == end_id)


def filled_slots(is_latent: torch.Tensor, num_spans: int, latent_size: int) -> torch.Tensor:
    """Which of the slots of `gather_spans` hold a latent of their row, `(B, S, K)`."""
    slots = torch.arange(num_spans * latent_size, device=is_latent.device)
    return (slots < is_latent.sum(1, keepdim=True)).view(len(is_latent), num_spans, latent_size)


def scatter_spans(
    inputs_embeds: torch.Tensor,
    is_latent: torch.Tensor,
    latent_values: torch.Tensor,
    latent_mask: torch.Tensor,
) -> torch.Tensor:
    """Puts given latents in as input embeddings (teacher forcing).

    Args:
        inputs_embeds (`torch.Tensor` of shape `(B, T, D)`): embeddings of the input ids.
        is_latent (`torch.BoolTensor` of shape `(B, T)`): where `<|latent_pad|>` stands.
        latent_values (`torch.Tensor` of shape `(B, S, K, D)`): the latents, in the order of the latent columns of a
            row.
        latent_mask (`torch.BoolTensor` of shape `(B, S, K)`): which of them are used; the columns of the others keep
            their own embedding.

    Returns:
        `torch.Tensor` of shape `(B, T, D)`: a new tensor.
    """
    slots = (is_latent.cumsum(1) - 1).clamp(min=0)  # (B, T): number of the latent within its row
    values = latent_values.flatten(1, 2)  # (B, S * K, D)
    values = values.gather(1, slots.unsqueeze(-1).expand(-1, -1, values.shape[-1]))  # (B, T, D)
    forced = is_latent & latent_mask.flatten(1).gather(1, slots)
    return torch.where(forced.unsqueeze(-1), values.to(inputs_embeds.dtype), inputs_embeds)


def chunk_bounds(is_latent: torch.Tensor) -> list[tuple[int, int]]:
    """Columns at which a chunk starts and ends: a new one at each column where some row has a latent."""
    cuts = is_latent.any(0).nonzero().flatten().tolist()
    return list(pairwise(sorted({0, *cuts, is_latent.shape[1]})))


def slice_features(
    mm_encoder_outputs: dict[str, Any], placeholders: dict[str, torch.Tensor], start: int, stop: int
) -> dict[str, Any]:
    """The image (and video) features whose placeholders stand in the columns from `start` to `stop`.

    Args:
        mm_encoder_outputs (`dict`): per modality, the output of the backbone's `get_image_features`.
        placeholders (`dict`): per modality, where its placeholder tokens stand, `torch.BoolTensor` (B, T).
    """
    sliced = {}
    for modality, output in mm_encoder_outputs.items():
        mask = placeholders[modality]
        rows = (mask.flatten().cumsum(0) - 1).view_as(mask)  # feature row of each placeholder
        inside = mask[:, start:stop]
        if inside.sum() == mask.sum():
            sliced[modality] = output
        elif inside.any():
            sliced[modality] = _slice_mm_encoder_output(output, rows[:, start:stop][inside])
    return sliced


def placeholders_of(config: PreTrainedConfig, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where the placeholders of images and videos stand, (B, T) each; a backbone may know no videos."""
    ids = {"image": config.image_token_id, "video": config.video_token_id}
    return {modality: torch.eq(input_ids, -1 if i is None else i) for modality, i in ids.items()}


@dataclass
class ColumnFacts:
    """What a rule of attention may know of each column of whole sequences, those in the cache included.

    Args:
        is_image (`torch.BoolTensor` of shape `(B, T)`): where placeholders of images and videos stand.
        is_latent (`torch.BoolTensor` of shape `(B, T)`): where `<|latent_pad|>` stands.
        latent_size (`int`): K.
    """

    is_image: torch.Tensor
    is_latent: torch.Tensor
    latent_size: int

    @classmethod
    def of(cls, config: PreTrainedConfig, input_ids: torch.Tensor) -> "ColumnFacts":
        """The facts about the columns of `input_ids` (B, T)."""
        placeholders = placeholders_of(config, input_ids)
        is_image = placeholders["image"] | placeholders["video"]
        return cls(is_image, input_ids == config.latent_pad_token_id, config.latent_size)

    @property
    def span(self) -> torch.Tensor:
        """`(B, T)`: the number of the span that a latent is in, from 0; elsewhere, how many spans end before.

        So the words of turn n, between span n - 1 and span n, have number n.
        """
        return (self.is_latent.cumsum(1) - self.is_latent.long()) // self.latent_size

    @property
    def num_columns(self) -> int:
        return self.is_latent.shape[1]

    def first(self, length: int) -> "ColumnFacts":
        """The facts of the first `length` columns."""
        return ColumnFacts(self.is_image[:, :length], self.is_latent[:, :length], self.latent_size)

    def followed_by(self, other: "ColumnFacts") -> "ColumnFacts":
        """These columns and the `other` ones behind them."""
        is_image = torch.cat([self.is_image, other.is_image], dim=1)
        return ColumnFacts(is_image, torch.cat([self.is_latent, other.is_latent], dim=1), self.latent_size)

    def of_rows(self, rows: torch.Tensor) -> "ColumnFacts":
        """The facts of other rows, (B,) each by its number."""
        return ColumnFacts(self.is_image[rows], self.is_latent[rows], self.latent_size)


@dataclass
class SpanState:
    """What travels with a cache from step to step of a generation, beside keys and values.

    Args:
        length (`torch.LongTensor` of shape `()`): of the cache when this was written; at another length the vectors
            below are those of another past. A tensor, since a number would be a constant of a compiled or exported
            step, and another one at each step.
        feedback (`torch.Tensor` of shape `(B, D)`, *optional*): what a latent in the next column would be.
        plan (`torch.Tensor` of shape `(B, K, D)`, *optional*): the latents of the span that a row is in, where they
            were computed in parallel.
        ahead (`torch.Tensor` of shape `(B, columns, D)`, *optional*): last hidden states of columns that are in the
            cache before `generate` has come to their step.
        columns (`ColumnFacts`, *optional*): of the columns in the cache, where a rule of attention asks for them.
    """

    length: torch.Tensor = field(default_factory=lambda: torch.tensor(0))
    feedback: torch.Tensor | None = None
    plan: torch.Tensor | None = None
    ahead: torch.Tensor | None = None
    columns: ColumnFacts | None = None

    @classmethod
    def of(cls, cache: Cache, num_columns: int = 1) -> "SpanState":
        """The state of a cache; an empty one if the cache was reset, cropped or filled by somebody else since.

        Args:
            num_columns (`int`): number of columns that come next. A step of generation, one column, does not look at
                the length of a static cache, a tensor on the device, nor at any while it is compiled or exported.
        """
        state = getattr(cache, "latent_spans", None)
        if state is None or not (num_columns == 1 and (cache.is_compileable or torch.compiler.is_compiling())):
            length = cache.get_seq_length()
            if state is None or int(state.length) != int(length):
                columns = None if state is None or not int(length) else state.columns
                state = cache.latent_spans = cls(length=torch.as_tensor(length).clone(), columns=columns)
        return state

    def grow(self, num_columns: int, columns: ColumnFacts | None) -> None:
        """Notes that the cache now holds more columns, with the facts about all of them."""
        self.length = self.length + num_columns
        self.columns = columns

    def take_out_of_graph(self) -> None:
        """Copies what a compiled step has written: recorded as a CUDA graph, its next run writes to the same place."""
        self.length = self.length.clone()
        self.feedback = None if self.feedback is None else self.feedback.clone()

    @property
    def has_columns_ahead(self) -> bool:
        return self.ahead is not None and self.ahead.shape[1] > 0

    def take_ahead(self) -> torch.Tensor:
        """The last hidden state `(B, 1, D)` of the first column that was computed ahead of its step."""
        first, self.ahead = self.ahead[:, :1], self.ahead[:, 1:]
        return first

    @staticmethod
    def drop_ahead(cache: Cache) -> None:
        """Takes the columns whose steps never came out of a cache, so that it ends where the generation ended."""
        state = getattr(cache, "latent_spans", None)
        if state is not None and state.has_columns_ahead:
            cache.crop(-state.ahead.shape[1])
            state.length = state.length - state.ahead.shape[1]
            state.ahead = None

    def reorder(self, beams: torch.Tensor) -> None:
        """Gives each row what belongs to the row `beams` (B,) that it goes on from."""
        for name in ("feedback", "plan", "ahead"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.index_select(0, beams.to(value.device)))
        if self.columns is not None:
            self.columns = self.columns.of_rows(beams.to(self.columns.is_latent.device))
