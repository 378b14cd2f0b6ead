"""What in a picture the model's own answer depends on: by its gradient, by its attention, or by hiding patches.

R pictures, N tokens of a picture, T columns, A columns of an answer, D hidden, V vocabulary.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ilvr import ILVRForConditionalGeneration

from .inputs.image_features import ImageFeatures, flatten_features
from .selection import masked_mean
from .teacher import MomentumTeacher


TOKENS_AT_ONCE = 16384  # columns of a forward with gradient: what fits beside a training step
WEIGHTS_AT_ONCE = 2**20  # pairs of columns of a forward that keeps the attention of all layers
HIDDEN_PATCHES = 64  # of a picture are hidden at most, one after the other
TOLD_LOSS = 0.01  # nats, from which hiding a patch says more than all gradients
LARGE_LOSS = 0.5  # nats, which need no further search


def speaking_teacher(student: Any, teacher: MomentumTeacher) -> ILVRForConditionalGeneration:
    """The student's class around the teacher's weights, so that it can generate; nothing is copied."""
    speaker = copy.copy(student)
    speaker._modules = {**student._modules, "model": teacher.model}
    speaker.__dict__.pop("forward", None)  # TRL patches the student's instance
    speaker.training = False
    return speaker


class AnswerRelevance(ABC):
    """
    Relevance of each patch of a picture to a question about it (ours).

    The model is shown the picture and asked the question; it answers greedily, or the answer is given: the words that
    follow the picture in a trace. What a patch has to do with that answer is what a subclass measures. No label is
    read.

    Args:
        model ([`ILVRForConditionalGeneration`]): sees and answers; its weights need no gradient.
        max_new_tokens (`int`): at which the model's own answers are cut.
    """

    def __init__(self, model: ILVRForConditionalGeneration, max_new_tokens: int) -> None:
        self.model, self.max_new_tokens = model, max_new_tokens
        accepted = inspect.signature(model.model.core.forward).parameters
        self.type_inputs = [name for name in ("mm_token_type_ids", "token_type_ids") if name in accepted]

    def __call__(self, helper_inputs: dict[str, torch.Tensor], outputs: Any) -> list[torch.Tensor]:
        """Relevances of the patches of each picture.

        Args:
            helper_inputs (`dict`): image tensors of R pictures, with `prompt_ids` and `prompt_mask` (R, T), the
                questions, padded on the left, each about its picture; `answer_ids` and `answer_mask` (R, A), padded
                on the right, are answers that are given, none where the mask is false throughout.
            outputs: the vision tower's output for them, see [`~inputs.image_features.image_outputs`].

        Returns:
            `list[torch.Tensor]`: (N,) for each picture, fp32.
        """
        lengths = helper_inputs["image_lengths"].tolist()
        features = flatten_features(outputs.pooler_output).split(lengths)
        deepstack = getattr(outputs, "deepstack_features", None) or ()
        layers = [flatten_features([layer] if isinstance(layer, torch.Tensor) else layer) for layer in deepstack]
        layers = [layer.split(lengths) for layer in layers]
        given = helper_inputs.get("answer_mask", helper_inputs["prompt_ids"][:, :0])  # (R, A)
        at_once = self._at_once(helper_inputs["prompt_ids"].shape[1] + max(given.shape[1], self.max_new_tokens))
        found: dict[int, torch.Tensor] = {}
        for is_given in (True, False):  # apart: the model generates the other answers
            rows = (given.any(1) == is_given).nonzero().flatten().tolist()
            for part in (rows[start : start + at_once] for start in range(0, len(rows), at_once)):
                tensors = {k: v[part] for k, v in helper_inputs.items() if len(v) == len(lengths)}
                own = [[layer[i] for i in part] for layer in layers]
                found |= zip(part, self._of_some(tensors, [features[i] for i in part], own, is_given))
        return [found[i] for i in range(len(lengths))]

    @abstractmethod
    def _at_once(self, columns: int) -> int:
        """How many pictures with questions of so many columns fit beside a training step."""

    @abstractmethod
    def _scores(self, asked: "AskedPictures") -> torch.Tensor:
        """The relevance of each patch of some pictures, one after the other: (N of all,)."""

    def _of_some(
        self,
        tensors: dict[str, torch.Tensor],
        features: list[torch.Tensor],
        layers: list[list[torch.Tensor]],
        is_given: bool,
    ) -> list[torch.Tensor]:
        config, prompts = self.model.config, tensors["prompt_ids"]
        own = {k: v for k, v in tensors.items() if k in ("image_grid_thw", "image_sizes")}

        def inputs(
            ids: torch.Tensor, pictures: torch.Tensor, layers: list[torch.Tensor], rows: Any = slice(None)
        ) -> dict[str, Any]:
            ids = ids[rows]
            answered = torch.ones_like(ids[:, prompts.shape[1] :])
            encoded = ImageFeatures([pictures], [[layer] for layer in layers])
            return {
                "input_ids": ids,
                "attention_mask": torch.cat([tensors["prompt_mask"][rows], answered], dim=1),
                **{name: (ids == config.image_token_id).int() for name in self.type_inputs},
                "mm_encoder_outputs": {"image": encoded},
                **{name: tensor[rows] for name, tensor in own.items()},
            }

        flat, flat_layers = torch.cat(features).detach(), [torch.cat(layer) for layer in layers]
        if is_given:
            answers, said = tensors["answer_ids"], tensors["answer_mask"].bool()
        else:
            with torch.no_grad():
                ids = self.model.generate(
                    **inputs(prompts, flat, flat_layers),
                    do_sample=False,
                    max_new_tokens=self.max_new_tokens,
                    suppress_tokens=[config.latent_start_token_id],
                )
            answers = ids[:, prompts.shape[1] :]
            said = self._is_said(answers)
        ids = torch.cat([prompts, answers], dim=1)

        def forward(pictures: torch.Tensor, layers: list[torch.Tensor], *rows: Any, **options: Any) -> Any:
            return self.model(**inputs(ids, pictures, layers, *rows), use_cache=False, **options)

        lengths = [len(picture) for picture in features]
        asked = AskedPictures(forward, flat, flat_layers, lengths, ids, said)
        return list(self._scores(asked).split(lengths))

    def _is_said(self, answer: torch.Tensor) -> torch.Tensor:
        """Where an answer (R, A) of the model has a token: up to its first end, included."""
        ends = self.model.generation_config.eos_token_id
        ended = torch.isin(answer, torch.tensor([] if ends is None else ends, device=answer.device)).int()
        return (ended.cumsum(1) - ended) == 0


@dataclass
class AskedPictures:
    """Some pictures, with what was asked and answered of each.

    Args:
        forward (`Callable`): the model's outputs for the ids, given features of the pictures and of their deepstack
            layers; of some rows, if their numbers are given too.
        features (`torch.Tensor` of shape `(N of all, D)`): of the pictures.
        layers (`list[torch.Tensor]`): the same of each deepstack layer, where a backbone has any.
        lengths (`list[int]`): N of each picture.
        ids (`torch.LongTensor` of shape `(R, T)`): questions and answers, which are the last A columns.
        said (`torch.BoolTensor` of shape `(R, A)`): where answers have a token.
    """

    forward: Callable
    features: torch.Tensor
    layers: list[torch.Tensor]
    lengths: list[int]
    ids: torch.Tensor
    said: torch.Tensor

    def log_probs(self, logits: torch.Tensor, rows: Any = slice(None)) -> torch.Tensor:
        """The log-probability (rows,) of the answers of some rows, of which these are the logits (rows, T, V)."""
        said = self.said[rows]
        log_probs = logits[:, -said.shape[1] - 1 : -1].float().log_softmax(-1)
        answers = self.ids[rows][:, -said.shape[1] :].unsqueeze(-1)
        return (log_probs.gather(-1, answers).squeeze(-1) * said).sum(1)


class AnswerGradient(AnswerRelevance):
    """The norm of the gradient of the answer's log-probability with respect to the patch's state in the decoder, a sum
    over the layers: which patch would change what I say? See [`AnswerRelevance`].

    At the feature that enters the decoder the gradient is less telling: it also has what the first layer does with all
    patches alike.
    """

    def _at_once(self, columns: int) -> int:
        return max(1, TOKENS_AT_ONCE // columns)

    def _scores(self, asked: AskedPictures) -> torch.Tensor:
        with torch.enable_grad():
            outputs = asked.forward(asked.features.requires_grad_(), asked.layers, output_hidden_states=True)
            states = outputs.hidden_states[1:]  # after each layer, (R, T, D)
            gradients = torch.autograd.grad(asked.log_probs(outputs.logits).sum(), states)
        norms = torch.stack([gradient.float().norm(dim=-1) for gradient in gradients]).sum(0)  # (R, T)
        return norms[asked.ids == self.model.config.image_token_id]


class AnswerOcclusion(AnswerGradient):
    """How much of its log-probability the answer loses when the patch is hidden, in units of `TOLD_LOSS`, plus the
    patch's share of the picture's [`AnswerGradient`]. See [`AnswerRelevance`].

    A patch is hidden behind the mean of the picture's other ones (occlusion, arXiv 1311.2901), features of the input
    and of deepstack layers alike. Each of the two misses what the other finds (ours): the gradient of an answer that
    is certain is all but zero everywhere, and hiding changes nothing where the answer is the one that the model gives
    by default.

    Each hidden patch costs a forward. Those with the largest gradient come first, and the search in a picture is over
    when as many as a span has latents have lost `LARGE_LOSS`, or `HIDDEN_PATCHES` are hidden.
    """

    def _scores(self, asked: AskedPictures) -> torch.Tensor:
        gradients = super()._scores(asked)
        # Which patch comes next, and which have been found, is settled on the CPU: what waits for the device is one
        # transfer for each patch of a picture, however many pictures there are.
        scores = [
            own / own.sum().clamp(min=torch.finfo(own.dtype).tiny) for own in gradients.cpu().split(asked.lengths)
        ]
        order = [own.argsort(descending=True).tolist() for own in scores]
        values = [asked.features.detach(), *asked.layers]
        hiding, found, wanted = HiddenPatches(values, asked.lengths), [0] * len(order), self.model.config.latent_size
        with torch.no_grad():
            whole = asked.log_probs(asked.forward(values[0], values[1:]).logits)
            for rank in range(HIDDEN_PATCHES):
                rows = [i for i, own in enumerate(order) if 1 < len(own) > rank and found[i] < wanted]
                if not rows:
                    break
                hidden = [order[i][rank] for i in rows]
                without = hiding.without(rows, hidden)
                logits = asked.forward(without[0], without[1:], rows).logits
                lost = whole[rows] - asked.log_probs(logits, rows)
                for i, j, loss in zip(rows, hidden, lost.clamp(min=0).tolist()):
                    scores[i][j] += loss / TOLD_LOSS
                    found[i] += loss >= LARGE_LOSS
        return torch.cat(scores).to(gradients.device)


class HiddenPatches:
    """Pictures in which one patch each is hidden behind the mean of the others.

    Args:
        values (`list[torch.Tensor]`): features (N of all, D) of some pictures, one after the other, of each layer.
        lengths (`list[int]`): N of each picture.
    """

    def __init__(self, values: list[torch.Tensor], lengths: list[int]) -> None:
        self.values, device = values, values[0].device
        self.lengths = torch.tensor(lengths, device=device)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.picture = torch.arange(len(lengths), device=device).repeat_interleave(self.lengths)  # of each patch
        nothing = torch.zeros(len(lengths), values[0].shape[1], device=device)  # sums are in fp32
        self.sums = [nothing.index_add(0, self.picture, own.float()) for own in values]

    def without(self, rows: list[int], hidden: list[int]) -> list[torch.Tensor]:
        """The features (N of the rows, D) of the pictures `rows`, ascending, each without its patch of `hidden`."""
        chosen = torch.tensor(rows, device=self.picture.device)
        patches = self.starts[chosen] + torch.tensor(hidden, device=chosen.device)
        kept, others = torch.isin(self.picture, chosen), (self.lengths[chosen] - 1).unsqueeze(1)
        found = []
        for own, sums in zip(self.values, self.sums):
            mean = (sums[chosen] - own[patches]) / others
            found.append(own.index_copy(0, patches, mean.to(own.dtype))[kept])
        return found


class AnswerAttention(AnswerRelevance):
    """The attention of the columns that say the answer to the patch, a mean over them, the layers and the heads: it is
    cheaper than [`AnswerGradient`], and needs attention weights. See [`AnswerRelevance`].

    Raises:
        ValueError: if the model's attention returns no weights.
    """

    def __init__(self, model: ILVRForConditionalGeneration, max_new_tokens: int) -> None:
        super().__init__(model, max_new_tokens)
        implementation = model.config.get_text_config()._attn_implementation
        if implementation != "eager":
            raise ValueError(
                f"selection_method='attention' reads attention weights, and {implementation!r} returns none. Load the "
                "model with attn_implementation='eager', or choose 'answer_gradient'."
            )

    def _at_once(self, columns: int) -> int:
        return max(1, WEIGHTS_AT_ONCE // columns**2)

    @torch.no_grad()
    def _scores(self, asked: AskedPictures) -> torch.Tensor:
        outputs = asked.forward(asked.features, asked.layers, output_attentions=True)
        layers = outputs.attentions  # (R, heads, T, T) each
        says = slice(-asked.said.shape[1] - 1, -1)  # A columns, of which t says t + 1
        paid = torch.stack([layer[:, :, says].float().mean(1) for layer in layers]).mean(0)  # (R, A, T)
        return masked_mean(paid, asked.said)[asked.ids == self.model.config.image_token_id]


RELEVANCES = {"answer_gradient": AnswerGradient, "answer_occlusion": AnswerOcclusion, "attention": AnswerAttention}
