"""What lmms-eval finds by the entry point `lmms_eval.models`, at each of its starts: importing `ilvr` can wait."""

from typing import Any


def manifest() -> Any:
    """The name `ilvr`, and the class that it stands for."""
    from lmms_eval.models.registry_v2 import ModelManifest  # ty: ignore[import-not-found]

    return ModelManifest("ilvr", chat_class_path="ilvr.evaluation.suites.lmms_eval_model.ILVR")
