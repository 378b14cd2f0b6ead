"""What in a picture the model's own answer depends on: the norm of the answer's gradient.

R pictures, N tokens of a picture, T columns, D hidden, V vocabulary.
"""

import copy
import inspect
from typing import Any

import torch

from ilvr import ILVRForConditionalGeneration

from .inputs.image_features import ImageFeatures, flatten_features
from .teacher import MomentumTeacher


TOKENS_AT_ONCE = 16384  # columns of a forward with gradient: what fits beside a training step


def speaking_teacher(student: Any, teacher: MomentumTeacher) -> ILVRForConditionalGeneration:
    """The student's class around the teacher's weights, so that it can generate; nothing is copied."""
    speaker = copy.copy(student)
    speaker._modules = {**student._modules, "model": teacher.model}
    speaker.__dict__.pop("forward", None)  # TRL patches the student's instance
    speaker.training = False
    return speaker


class AnswerGradient:
    """
    Relevance of each patch of a picture to a question about it (ours).

    The model is shown the picture and asked the question; it answers greedily. The relevance of a patch is the norm of
    the gradient of the answer's log-probability with respect to the patch's state in the decoder, summed over the
    layers: which patch would change what I say? No label is read. At the feature that enters the decoder the gradient
    is less telling: it also has what the first layer does with all patches alike.

    Args:
        model ([`ILVRForConditionalGeneration`]): sees and answers; its weights need no gradient.
        max_new_tokens (`int`): at which answers are cut.
    """

    def __init__(self, model: ILVRForConditionalGeneration, max_new_tokens: int) -> None:
        self.model, self.max_new_tokens = model, max_new_tokens
        accepted = inspect.signature(model.model.core.forward).parameters
        self.type_inputs = [name for name in ("mm_token_type_ids", "token_type_ids") if name in accepted]

    def __call__(self, helper_inputs: dict[str, torch.Tensor], outputs: Any) -> list[torch.Tensor]:
        """Relevances of the patches of each picture.

        Args:
            helper_inputs (`dict`): image tensors of R pictures, with `prompt_ids` and `prompt_mask` (R, T), the
                questions, padded on the left, each about its picture.
            outputs: the vision tower's output for them, see [`~inputs.image_features.image_outputs`].

        Returns:
            `list[torch.Tensor]`: (N,) for each picture, fp32.
        """
        lengths = helper_inputs["image_lengths"].tolist()
        features = flatten_features(outputs.pooler_output).split(lengths)
        deepstack = getattr(outputs, "deepstack_features", None) or ()
        layers = [flatten_features([layer] if isinstance(layer, torch.Tensor) else layer) for layer in deepstack]
        layers = [layer.split(lengths) for layer in layers]
        columns = helper_inputs["prompt_ids"].shape[1] + self.max_new_tokens
        at_once = max(1, TOKENS_AT_ONCE // columns)
        found: list[torch.Tensor] = []
        for start in range(0, len(lengths), at_once):
            part = slice(start, start + at_once)
            tensors = {k: v[part] for k, v in helper_inputs.items() if len(v) == len(lengths)}
            found += self._of_some(tensors, list(features[part]), [list(layer[part]) for layer in layers])
        return found

    def _of_some(
        self, tensors: dict[str, torch.Tensor], features: list[torch.Tensor], layers: list[list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        config, prompts = self.model.config, tensors["prompt_ids"]
        own = {k: v for k, v in tensors.items() if k in ("image_grid_thw", "image_sizes")}

        def inputs(ids: torch.Tensor, pictures: torch.Tensor) -> dict[str, Any]:
            answered = torch.ones_like(ids[:, prompts.shape[1] :])
            encoded = ImageFeatures([pictures], [[torch.cat(layer)] for layer in layers])
            return {
                "input_ids": ids,
                "attention_mask": torch.cat([tensors["prompt_mask"], answered], dim=1),
                **{name: (ids == config.image_token_id).int() for name in self.type_inputs},
                "mm_encoder_outputs": {"image": encoded},
                **own,
            }

        flat = torch.cat(features).detach()
        with torch.no_grad():
            ids = self.model.generate(
                **inputs(prompts, flat),
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                suppress_tokens=[config.latent_start_token_id],
            )
        with torch.enable_grad():
            flat = flat.requires_grad_()
            outputs = self.model(**inputs(ids, flat), use_cache=False, output_hidden_states=True)
            logits = outputs.logits[:, prompts.shape[1] - 1 : -1].float()
            answer = ids[:, prompts.shape[1] :]
            log_probs = logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).squeeze(-1)  # (R, answer)
            states = outputs.hidden_states[1:]  # after each layer, (R, T, D)
            gradients = torch.autograd.grad((log_probs * self._is_said(answer)).sum(), states)
        norms = torch.stack([gradient.float().norm(dim=-1) for gradient in gradients]).sum(0)  # (R, T)
        return list(norms[ids == config.image_token_id].split([len(own) for own in features]))

    def _is_said(self, answer: torch.Tensor) -> torch.Tensor:
        """Where an answer (R, T) has a token: up to its first end, included."""
        ends = self.model.generation_config.eos_token_id
        ended = torch.isin(answer, torch.tensor([] if ends is None else ends, device=answer.device)).int()
        return (ended.cumsum(1) - ended) == 0
