"""Interchange training: the last span of latents is another row's, and so is the answer that is trained (ours).

The idea is that of interchange interventions (Geiger et al., arXiv 2112.00826): a part of a network holds a variable
if the output becomes another input's where that part is taken from it. Here the network is trained to do so.

B batch, T sequence, D hidden.
"""

from dataclasses import replace

import torch

from ilvr.latent_decoding import Intervention

from .inputs.data_collator import LatentBatch


BY_COLUMN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def draw_donors(batch: LatentBatch, share: float, start_id: int) -> torch.Tensor:
    """For each row the row whose last span it is given, (B,): itself where it keeps its own.

    Rows are drawn with probability `share`. A donor keeps its own latents, so that they are what its own words lead
    to; it has its last span in the same column, and as many words to predict after it, so that the loss of a step is
    over as many words as before. The last span of both tells their answer. A row without a donor keeps its own.

    Args:
        batch ([`LatentBatch`]): with `tells_answer`.
        share (`float`): of rows, from 0 to 1.
        start_id (`int`): id of `<|latent_start|>`.
    """
    last = _last_start(batch, start_id)
    words = ((batch.shift_labels != -100) & _behind(batch, last)).sum(1)
    facts = torch.stack([last, (batch.inputs["input_ids"] == start_id).sum(1), words], dim=1)  # (B, 3)
    alike = (facts.unsqueeze(1) == facts).all(-1)  # (B, B)
    drawn = torch.rand(len(last), device=last.device) < share
    assert batch.tells_answer is not None
    tells = batch.tells_answer & (last >= 0)
    fits = alike & (tells & drawn).unsqueeze(1) & (tells & ~drawn)
    chosen = torch.rand(fits.shape, device=last.device).masked_fill(~fits, -1).argmax(1)
    return torch.where(fits.any(1), chosen, torch.arange(len(last), device=last.device))


def swap_last_spans(batch: LatentBatch, donors: torch.Tensor, start_id: int) -> tuple[LatentBatch, Intervention]:
    """The batch whose rows go on after their last span as their donors do, and what gives them the donors' latents.

    Args:
        batch ([`LatentBatch`]).
        donors (`torch.LongTensor` of shape `(B,)`): of [`draw_donors`].
        start_id (`int`): id of `<|latent_start|>`.
    """
    behind = _behind(batch, _last_start(batch, start_id))
    last_span = (batch.inputs["input_ids"] == start_id).sum(1) - 1

    def put(values: torch.Tensor) -> torch.Tensor:  # (B, T)
        return torch.where(behind, values[donors], values)

    def intervene(latents: torch.Tensor, span: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.where((span == last_span).unsqueeze(1), latents[donors], latents)

    inputs = {name: put(value) if name in BY_COLUMN else value for name, value in batch.inputs.items()}
    changed = {"assistant_mask": put(batch.assistant_mask), "shift_labels": put(batch.shift_labels)}
    return replace(batch, inputs=inputs, **changed), intervene


def _last_start(batch: LatentBatch, start_id: int) -> torch.Tensor:
    """The column of the last `<|latent_start|>` of each row, (B,); -1 where there is none."""
    starts = batch.inputs["input_ids"] == start_id
    columns = torch.arange(starts.shape[1], device=starts.device)
    return torch.where(starts, columns, -1).amax(1)


def _behind(batch: LatentBatch, columns: torch.Tensor) -> torch.Tensor:
    """The columns from `columns` (B,) on, (B, T)."""
    width = batch.shift_labels.shape[1]
    return torch.arange(width, device=columns.device) >= columns.unsqueeze(1)
