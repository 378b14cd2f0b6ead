"""What the student is given beside its sequences: the latents that it is fed, and what it may not see.

Options against two bypasses: images that make latents needless, and targets that are better than what the model will
predict itself. All of them are off by default, and none of them touches an evaluation.

B batch, S spans, K latents a span, D hidden.
"""

from collections.abc import Callable
from typing import Any

import torch

from ilvr import hide_images_after_first_span
from ilvr.latent_attention import AttentionRule

from .ilvr_training_config import ILVRTrainingConfig
from .selection import Selection


class StudentInputs:
    """The student's inputs of a batch, by the options of [`ILVRTrainingConfig`].

    Args:
        args ([`ILVRTrainingConfig`]).
        attention_rule (`Callable`, *optional*): of all rows, always.
        predict (`Callable`): the latents (B, S, K, D) that the student predicts for the inputs of [`ILVRModel`].
        progress (`Callable`): gives the share of the run that is done, 0 to 1.

    Raises:
        ValueError: if a rule is given beside `image_dropout`, which hides images by one of its own.
    """

    def __init__(
        self,
        args: ILVRTrainingConfig,
        attention_rule: AttentionRule | None,
        predict: Callable[..., torch.Tensor],
        progress: Callable[[], float],
    ) -> None:
        self.args, self.attention_rule = args, attention_rule
        self.predict, self.progress = predict, progress
        if attention_rule is not None and args.image_dropout:
            raise ValueError(
                f"image_dropout={args.image_dropout} hides images from some rows by a rule of its own, beside which "
                "there can be no attention_rule. Leave one of them out."
            )

    def __call__(self, inputs: dict[str, Any], selection: Selection | None, *, training: bool) -> dict[str, Any]:
        """Further inputs of [`ILVRForConditionalGeneration`] for `inputs`."""
        fed: dict[str, Any] = {} if self.attention_rule is None else {"attention_rule": self.attention_rule}
        if selection is not None and self.args.stage == 1:
            fed |= {"latent_values": selection.targets, "latent_mask": selection.mask}
            if training and self.args.own_latents:
                fed = self._with_own_latents(inputs, fed)
        if training and self.args.image_dropout:
            fed |= self._without_images(len(inputs["input_ids"]), inputs["input_ids"].device)
        return fed

    def _with_own_latents(self, inputs: dict[str, Any], fed: dict[str, Any]) -> dict[str, Any]:
        """Some rows are fed what the student predicts for them, as in inference: in all slots of their spans.

        Scheduled sampling (arXiv 1506.03099), whose share of rows grows over the run from 0 to `args.own_latents`. The
        predictions are of a forward that is fed the targets, and constants: the gradient is stage 2's.
        """
        targets, mask = fed["latent_values"], fed["latent_mask"]
        rows = torch.rand(len(targets), device=targets.device) < self.args.own_latents * self.progress()  # (B,)
        if not rows.any():
            return fed
        with torch.no_grad():
            own = self.predict(**inputs, **fed).to(targets.dtype)
        drawn = rows.view(-1, 1, 1)
        return {
            **fed,
            "latent_values": torch.where(drawn.unsqueeze(-1), own, targets),
            "latent_mask": torch.where(drawn, mask.any(-1, keepdim=True), mask),
        }

    def _without_images(self, batch_size: int, device: torch.device) -> dict[str, Any]:
        """Some rows may not look at their images after the first span (LIVR, arXiv 2512.21218; CVRR, 2609.06746)."""
        share = self.args.image_dropout
        if self.args.image_dropout_schedule == "linear":
            share = share * self.progress()
        rows = torch.rand(batch_size, device=device) < share  # (B,)
        if not rows.any():
            return {}
        return {"attention_rule": hide_images_after_first_span, "attention_rule_rows": rows}
