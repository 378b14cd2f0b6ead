"""What the plugins touch of lmms-eval 0.7 and of VLMEvalKit, written anew, for machines without these packages."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType


class Lmms(ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self):
        return self._rank

    @abstractmethod
    def loglikelihood(self, requests): ...

    @abstractmethod
    def generate_until(self, requests): ...

    @abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclass
class TokenCounts:
    output_tokens: int


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts


@dataclass
class Instance:
    """A request: its context, `doc_to_messages`, `generation_kwargs`, number of the doc, task, split."""

    args: tuple


@dataclass
class ChatMessages:
    messages: list

    def to_hf_messages(self):
        """Images are under `url` in a task's messages, and under `image` in what a chat template takes."""
        return [{"role": m["role"], "content": [self._part(part) for part in m["content"]]} for m in self.messages]

    @staticmethod
    def _part(part):
        return part if part["type"] == "text" else {"type": part["type"], part["type"]: part["url"]}


class BaseModel:
    """Of VLMEvalKit: a message is a text, or a list of `{"type": …, "value": …}`."""

    def __init__(self):
        self.dump_image_func = None

    def set_dump_image(self, function):
        self.dump_image_func = function

    def generate(self, message, dataset=None):
        return self.generate_inner(
            [{"type": "text", "value": message}] if isinstance(message, str) else message, dataset
        )


def module(name, **members):
    made = ModuleType(name)
    vars(made).update(members)
    return made


LMMS_EVAL = [
    module("lmms_eval"),
    module("lmms_eval.api"),
    module("lmms_eval.api.instance", GenerationResult=GenerationResult, Instance=Instance, TokenCounts=TokenCounts),
    module("lmms_eval.api.model", lmms=Lmms),
    module("lmms_eval.protocol", ChatMessages=ChatMessages),
]
VLMEVAL = [module("vlmeval"), module("vlmeval.vlm"), module("vlmeval.vlm.base", BaseModel=BaseModel)]
VLMEVAL[0].vlm = VLMEVAL[1]
