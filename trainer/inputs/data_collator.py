"""Batches of prepared samples, with the latent spans of all rows in the same columns.

B batch, T sequence, S spans, K latents a span.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.data.data_collator import DataCollatorMixin

from ilvr import ILVRProcessor
from ilvr.data.images import open_image

from .columns import (
    FOLLOWED_PATCHES,
    HELPER_ANSWERS,
    HELPER_IMAGES,
    HELPER_PROMPTS,
    TARGET_INDICES,
    TELLS_ANSWER,
    USER_IMAGES,
)
from .image_tensors import encode_helper_images, encode_images, merge_images, unpack


HELPER_PREFIX = "helper_"


def align_spans(rows: list[list[int]], start_id: int) -> list[list[int]]:
    """Lays out token rows so that the s-th latent span of each row starts in the same column.

    A row is cut before each `<|latent_start|>` and each piece is padded to the longest of its number: the first one,
    the prompt, on the left, the others on the right. The walk through latent spans then makes K cuts a span, and not
    up to B * K.

    Args:
        rows (`list[list[int]]`): token ids.
        start_id (`int`): id of `<|latent_start|>`.

    Returns:
        `list[list[int]]`: for each row and column of the batch, the index of the token to put there, -1 for padding.
    """
    pieces = []
    for row in rows:
        starts = [i for i, token in enumerate(row) if token == start_id]
        pieces.append([list(range(a, b)) for a, b in zip([0, *starts], [*starts, len(row)])])
    layout = [[] for _ in rows]
    for s in range(max(len(p) for p in pieces)):
        width = max(len(p[s]) for p in pieces if s < len(p))
        for columns, p in zip(layout, pieces):
            piece = p[s] if s < len(p) else []
            padding = [-1] * (width - len(piece))
            columns += padding + piece if s == 0 else piece + padding
    return layout


@dataclass
class LatentDataCollator(DataCollatorMixin):
    """Collates samples prepared by [`prepare_dataset`].

    Since a batch can have padding between the words of a row, `shift_labels` says at each column what the next *token*
    is, whatever its column: position t predicts `shift_labels[:, t]`. There is no loss on prompts and latents.
    `labels` are the same in the tokens' own columns; `Trainer` wants them beside `shift_labels`.

    Args:
        processor ([`ILVRProcessor`]).
        pad_to_multiple_of (`int`, *optional*): pads the length of the batch further, on the right.
        helper_images (`bool`, *optional*, defaults to `True`): whether helper images are opened; stage 2 has no use
            for them.

    Returns:
        `dict`: `input_ids`, `attention_mask`, `assistant_mask`, `labels`, `shift_labels` (B, T), `mm_token_type_ids`
        if the backbone has it, the processor's tensors of the user images with `image_lengths` (images,), the tokens
        of each, and `images_per_row` (B,); and, prefixed by `helper_`, the tensors of the helper images. Features in
        place of pixels if they are cached. Where the samples have them: `helper_prompt_ids` and `helper_prompt_mask`
        (helper images, T), what is asked of each, padded on the left; `helper_answer_ids` and `helper_answer_mask`
        (helper images, A), the answers that a trace gives, padded on the right; `helper_followed_patches` (helper
        images,), the patch of each that is followed, -1 if unknown; `target_indices` (B, S, K), the patches that were
        selected, -1 for none; `tells_answer` (B,), whether the last span tells the answer. [`LatentBatch`] takes it
        apart.
    """

    processor: ILVRProcessor
    pad_to_multiple_of: int | None = None
    helper_images: bool = True
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        start_id, latent_pad_id, _ = self.processor.latent_token_ids
        layout = align_spans([example["input_ids"] for example in examples], start_id)
        if self.pad_to_multiple_of:
            missing = -len(layout[0]) % self.pad_to_multiple_of
            layout = [columns + [-1] * missing for columns in layout]
        source = torch.tensor(layout)  # (B, T)
        present = source >= 0
        batch = {
            "input_ids": _lay_out(examples, "input_ids", layout, self.processor.tokenizer.pad_token_id),
            "attention_mask": present.long(),
            "assistant_mask": _lay_out(examples, "assistant_mask", layout, False).bool() & present,
        }
        examples = [dict(example) for example in examples]
        for example in examples:
            counted = [
                token if in_turn and token != latent_pad_id else -100
                for token, in_turn in zip(example["input_ids"], example["assistant_mask"])
            ]
            example["labels"], example["shift_labels"] = counted, [*counted[1:], -100]
        for name in ("labels", "shift_labels"):
            batch[name] = _lay_out(examples, name, layout, -100)
        for name in {"mm_token_type_ids", "token_type_ids"} & set(self.processor.model_input_names):
            types = self.processor.create_mm_token_type_ids(batch["input_ids"].tolist())
            batch[name] = torch.tensor(types)
        user = [self._image_tensors(example, USER_IMAGES, encode_images) for example in examples]
        counts = [len(tensors["image_lengths"]) if tensors else 0 for tensors in user]
        batch |= {**merge_images(user), "images_per_row": torch.tensor(counts)}
        if TELLS_ANSWER in examples[0]:
            batch[TELLS_ANSWER] = torch.tensor([example[TELLS_ANSWER] for example in examples])
        if self.helper_images:
            helper = merge_images([self._image_tensors(row, HELPER_IMAGES, encode_helper_images) for row in examples])
            helper |= self._helper_prompts(examples)
            if FOLLOWED_PATCHES in examples[0]:
                helper[FOLLOWED_PATCHES] = torch.tensor([patch for row in examples for patch in row[FOLLOWED_PATCHES]])
            batch |= {HELPER_PREFIX + name: tensor for name, tensor in helper.items()}
            if TARGET_INDICES in examples[0]:
                batch[TARGET_INDICES] = self._target_indices(examples)
        return batch

    def _helper_prompts(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, column, side in (("prompt", HELPER_PROMPTS, "left"), ("answer", HELPER_ANSWERS, "right")):
            asked = [row.get(column) or [[]] * len(row.get(HELPER_PROMPTS) or ()) for row in examples]
            rows = [torch.tensor(ids, dtype=torch.long) for own in asked for ids in own]
            if any(map(len, rows)):
                pad = partial(pad_sequence, batch_first=True, padding_side=side)
                found[f"{name}_ids"] = pad(rows, padding_value=self.processor.tokenizer.pad_token_id)
                found[f"{name}_mask"] = pad([torch.ones_like(row) for row in rows])
        return found

    def _target_indices(self, examples: list[dict]) -> torch.Tensor:
        size = self.processor.latent_size
        rows = [[[*span, *[-1] * (size - len(span))] for span in row[TARGET_INDICES]] for row in examples]
        num_spans = max(map(len, rows))
        filled = [[*row, *[[-1] * size] * (num_spans - len(row))] for row in rows]
        return torch.tensor(filled).view(len(rows), num_spans, size)

    def _image_tensors(self, example: dict, column: str, encode: Callable) -> dict[str, torch.Tensor]:
        if isinstance(example[column], bytes):
            return unpack(example[column])
        images = example.get("images") or []
        return encode((open_image(images[i], f"Image {i} of a sample") for i in example[column]), self.processor)


def _lay_out(examples: list[dict], column: str, layout: list[list[int]], padding: Any) -> torch.Tensor:
    rows = [[*example[column], padding] for example in examples]  # index -1 is the padding
    return torch.tensor([[row[i] for i in columns] for row, columns in zip(rows, layout)])


@dataclass
class LatentBatch:
    """A collated batch, taken apart.

    Args:
        inputs (`dict`): the model's inputs.
        helper_inputs (`dict`): image tensors of the helper images, in the order of rows and spans.
        assistant_mask (`torch.BoolTensor` of shape `(B, T)`): tokens of the assistant's turns.
        shift_labels (`torch.LongTensor` of shape `(B, T)`): the next token at each column, -100 for no loss.
        images_per_row (`torch.LongTensor` of shape `(B,)`): images of the user.
        image_lengths (`torch.LongTensor` of shape `(images,)`, *optional*): tokens of each of them.
        target_indices (`torch.LongTensor` of shape `(B, S, K)`, *optional*): what was selected before training.
        tells_answer (`torch.BoolTensor` of shape `(B,)`, *optional*): whether the last span of a row tells its answer.
    """

    inputs: dict[str, torch.Tensor]
    helper_inputs: dict[str, torch.Tensor]
    assistant_mask: torch.Tensor
    shift_labels: torch.Tensor
    images_per_row: torch.Tensor
    image_lengths: torch.Tensor | None = None
    target_indices: torch.Tensor | None = None
    tells_answer: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor]) -> "LatentBatch":
        """Takes a batch of [`LatentDataCollator`] apart, and leaves it as it is."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        own = {f.name: inputs.pop(f.name) for f in fields(cls) if f.name in inputs}
        helper = {k.removeprefix(HELPER_PREFIX): inputs.pop(k) for k in list(inputs) if k.startswith(HELPER_PREFIX)}
        return cls(inputs, helper, **own)
