"""A model of lmms-eval (0.7), which finds it by the entry point `lmms_eval.models`: `lmms-eval --model ilvr`."""

import json
import logging
from collections import defaultdict
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts  # ty: ignore[import-not-found]
from lmms_eval.api.model import lmms  # ty: ignore[import-not-found]
from lmms_eval.protocol import ChatMessages  # ty: ignore[import-not-found]
from tqdm.auto import tqdm

from .answering import SAMPLING, Answering


logger = logging.getLogger(__name__)
DECODING = ("max_new_tokens", "do_sample", "num_beams", "repetition_penalty", *SAMPLING)
UNSTOPPING = "\n\n"  # lmms-eval's default where a task names no end; a chain of thought has paragraphs


class ILVR(lmms):
    """Answers in words, thought with latents that the suite does not see.

    Args:
        pretrained (`str`): folder or Hub id of an ILVR checkpoint.
        batch_size (`int`, *optional*, defaults to 1): questions answered at once.
        latents (`str`, *optional*, defaults to `"own"`): or a control of
            [`~ilvr.evaluation.suites.answering.LATENTS`], to see whether a score needs them.
        max_new_tokens (`int`, *optional*): in place of what tasks ask for, which may be too few to think in.
        device (`str`, *optional*): `cpu`, to leave a GPU alone.
        dtype (`str`, *optional*, defaults to `"auto"`), attn_implementation (`str`, *optional*), revision (`str`,
            *optional*): passed to `from_pretrained`.
        seed (`int`, *optional*, defaults to 0): of noise.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        latents: str = "own",
        max_new_tokens: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,  # of lmms-eval's own search for one, which is not done here
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number from 1 on, got {batch_size!r}.")
        given = {"attn_implementation": attn_implementation, "revision": revision}
        kwargs: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if device == "cpu":
            kwargs["device_map"] = "cpu"
        PartialState()  # each process of a launcher takes its own device before anything is moved there
        self.answer = Answering(pretrained, latents=latents, seed=seed, dtype=dtype, **kwargs)
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens

    @property
    def device(self) -> torch.device:
        return self.answer.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer for each request, in their order; those with the same settings share batches."""
        groups = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[2], sort_keys=True, default=str)].append(index)
        found: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), desc="Answering", disable=self.rank != 0) as bar:
            for group in groups.values():
                settings = requests[group[0]].args[2]
                ends, generate_kwargs = self._settings(settings)
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    answers = self.answer([self._messages(requests[i]) for i in batch], **generate_kwargs)
                    for index, answer in zip(batch, answers):
                        counts = TokenCounts(output_tokens=answer.tokens)
                        found[index] = GenerationResult(text=cut(answer.text, ends), token_counts=counts)
                    bar.update(len(batch))
        return [found[index] for index in range(len(requests))]

    def _messages(self, request: Instance) -> list[dict[str, Any]]:
        _, messages_of, _, doc_id, task, split = request.args
        return ChatMessages(messages=messages_of(self.task_dict[task][split][doc_id])).to_hf_messages()

    def _settings(self, asked: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Where answers end, and arguments of `generate`, of a task's `generation_kwargs`."""
        ends = asked.get("until") or []
        known = {name: asked[name] for name in DECODING if name in asked}
        if ignored := asked.keys() - known.keys() - {"until"}:
            logger.warning("generation_kwargs of the task that have no meaning here: %s.", ", ".join(sorted(ignored)))
        if self.max_new_tokens is not None:
            known["max_new_tokens"] = self.max_new_tokens
        return [end for end in ([ends] if isinstance(ends, str) else ends) if end and end != UNSTOPPING], known

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("Likelihoods of given answers would leave the latents out. Choose generation tasks.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("Rounds are not supported. Choose tasks with one answer a question.")


def cut(text: str, ends: list[str]) -> str:
    """A text up to the first of some strings."""
    for end in ends:
        text = text.split(end, 1)[0]
    return text
