"""A model of VLMEvalKit, which has no plugins.

In its folder, `python -m ilvr.evaluation.suites.vlmevalkit_model --config …` is its `run.py` with the class `ILVR`.
"""

import runpy
from pathlib import Path
from typing import Any

import vlmeval.vlm  # ty: ignore[import-not-found]
from vlmeval.vlm.base import BaseModel  # ty: ignore[import-not-found]

from .answering import Answering


class ILVR(BaseModel):
    """Answers in words, thought with latents that the suite does not see; one question at a time, as the suite asks.

    Args:
        model_path (`str`): folder or Hub id of an ILVR checkpoint.
        latents (`str`, *optional*, defaults to `"own"`): or a control of
            [`~ilvr.evaluation.suites.answering.LATENTS`].
        max_new_tokens (`int`, *optional*, defaults to 1024)
        generate_kwargs: such as `temperature`; greedy decoding by default.
        dtype (`str`, *optional*, defaults to `"auto"`), attn_implementation (`str`, *optional*): passed to
            `from_pretrained`.
    """

    INTERLEAVE = True

    def __init__(
        self,
        model_path: str,
        *,
        latents: str = "own",
        dtype: str = "auto",
        attn_implementation: str | None = None,
        max_new_tokens: int = 1024,
        **generate_kwargs: Any,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        self.answer = Answering(model_path, latents=latents, dtype=dtype, **kwargs)
        self.settings = {"max_new_tokens": max_new_tokens, **generate_kwargs}

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to a list of `{"type": "text" or "image", "value": …}`, an image by its path."""
        parts = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        (answer,) = self.answer([[{"role": "user", "content": parts}]], **self.settings)
        return answer.text


def main() -> None:
    if not Path("run.py").is_file():
        raise SystemExit("There is no run.py here. Start this in the folder of VLMEvalKit.")
    vlmeval.vlm.ILVR = ILVR
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
