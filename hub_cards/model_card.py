"""The model card of an ILVR checkpoint: data rendered by a template."""

import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import httpx2  # by which huggingface_hub reads the Hub
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    model_info,
)


TEMPLATE = Path(__file__).parent / "model_card_template.md"
CARD_DATA = "card.json"  # in a checkpoint's folder: what its card says
PACKAGES = ("ilvr", "torch", "transformers", "trl", "peft", "datasets")
LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass
class Result:
    """One measured number.

    Args:
        task (`str`): what was measured, such as `"FrozenLake planning 3x3"`.
        metric (`str`): its name, such as `"end_on_goal"`.
        value (`float`): between 0 and 1.
        count (`int`): number of samples.
        low, high (`float`, *optional*): 95 % interval.
        dataset (`str`, *optional*, defaults to `task`): name of the data.
        dataset_id (`str`, *optional*): Hub id of the data; `None` for data that is not on the Hub, whose type the
            card's metadata then gives as `unknown`.
        dataset_config (`str`, *optional*): part of the data, such as `"3x3"`. Results that agree in id, config and
            split are one entry to the Hub, under the name of the first; without an id, `task` keeps them apart.
        dataset_split (`str`, *optional*): such as `"test"`.
    """

    task: str
    metric: str
    value: float
    count: int
    low: float | None = None
    high: float | None = None
    dataset: str | None = None
    dataset_id: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None

    def to_eval_result(self) -> EvalResult:
        """The entry of the card's metadata."""
        return EvalResult(
            task_type="image-text-to-text",
            task_name=self.task,
            dataset_type=self.dataset_id or "unknown",
            dataset_name=self.dataset or self.task,
            dataset_config=self.dataset_config or (None if self.dataset_id else self.task),
            dataset_split=self.dataset_split,
            metric_type=self.metric,
            metric_name=self.metric,
            metric_value=round(self.value, 4),
        )


@cache
def license_of(base_model: str) -> dict[str, str]:
    """What the card of a model on the Hub says of its license: `license`, `license_name` and `license_link`.

    Empty if there is no such card, it names none, or the Hub is out of reach: none is better than a wrong one.
    """
    try:
        model_info(base_model, timeout=5)  # one request: a download tries for minutes where there is no network
        data = ModelCard.load(base_model).data.to_dict()
    except (httpx2.HTTPError, OSError, ValueError):
        return {}
    return {name: data[name] for name in LICENSE_FIELDS if data.get(name)}


@dataclass
class ILVRModelCard:
    """What a card says. `save` writes it into a checkpoint's folder, for people and for `load`.

    Args:
        model_name (`str`): heading of the card.
        latent_size (`int`): K.
        repo_id (`str`, *optional*, defaults to `model_name`): what the code of the card loads.
        base_model (`str`, *optional*): Hub id of the backbone; `None` for one built from scratch.
        license (`str`, *optional*, defaults to that of the base model's card): of the weights; none is written if none
            is known.
        dataset (`str`, *optional*): Hub id of the training data.
        training (`dict`, *optional*): settings, shown as a table.
        results (`list[Result]`, *optional*): measured numbers.
        controls (`list[Result]`, *optional*): the same questions with something else in the place of the latents,
            which `task` names; a table of its own, for on the Hub they would look like results of the model.
        example_prompt, example_image (`str`, *optional*): used in the code.
        is_adapter (`bool`, *optional*, defaults to `False`): whether the checkpoint is a PEFT adapter of the backbone.
    """

    model_name: str
    latent_size: int
    repo_id: str | None = None
    base_model: str | None = None
    license: str | None = None
    dataset: str | None = None
    training: dict[str, Any] | None = None
    results: list[Result] | None = None
    controls: list[Result] | None = None
    example_prompt: str = "What happens next in this picture?"
    example_image: str = "picture.png"
    is_adapter: bool = False

    def render(self) -> ModelCard:
        """The card as Markdown with its metadata."""
        data = ModelCardData(
            library_name="peft" if self.is_adapter else "transformers",
            pipeline_tag="image-text-to-text",
            tags=["ilvr", "latent-visual-reasoning", "lora" if self.is_adapter else "custom_code"],
            base_model=self.base_model,
            datasets=self.dataset,
            model_name=self.model_name,
            eval_results=[result.to_eval_result() for result in self.results or []] or None,
            **cast(Any, self._rights()),
        )
        return ModelCard.from_template(
            data,
            template_path=str(TEMPLATE),
            model_name=self.model_name,
            repo_id=self.repo_id or self.model_name,
            latent_size=self.latent_size,
            base_model=self.base_model,
            training=self.training,
            results=self.results,
            controls=self.controls,
            example_prompt=self.example_prompt,
            example_image=self.example_image,
            is_adapter=self.is_adapter,
            versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
        )

    def _rights(self) -> dict[str, str]:
        """Metadata that follows from the base model: the relation to it and, unless one is given, the license."""
        rights = {"license": self.license} if self.license else {}
        if self.base_model:
            rights = rights or license_of(self.base_model)
            return {**rights, "base_model_relation": "adapter" if self.is_adapter else "finetune"}
        return rights

    def eval_results(self) -> dict[str, str]:
        """Files `.eval_results/*.yaml` by path: the results on data sets of the Hub, for their leaderboards.

        One file a data set; its task there is a result's `dataset_config`, or `default`.
        """
        files: dict[str, list[EvalResultEntry]] = {}
        for result in self.results or []:
            if result.dataset_id is not None:
                name = f".eval_results/{result.dataset_id.replace('/', '_')}.yaml"
                task = result.dataset_config or "default"
                notes = f"{result.task}, {result.metric}, n = {result.count}"
                entry = EvalResultEntry(result.dataset_id, task, round(result.value, 4), notes=notes)
                files.setdefault(name, []).append(entry)
        return {
            name: yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
            for name, entries in files.items()
        }

    def save(self, folder: str | Path) -> None:
        """Writes the card as `README.md` into a folder, and what it says as `card.json`."""
        self.render().save(Path(folder) / "README.md")
        data = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (Path(folder) / CARD_DATA).write_text(f"{data}\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "ILVRModelCard":
        """The card of a checkpoint's folder: what `save` wrote or, where it did not, what the checkpoint itself says.

        Raises:
            ValueError: if the folder holds no ILVR checkpoint, or `card.json` says what a card does not.
        """
        folder = Path(folder)
        if (folder / CARD_DATA).is_file():
            data = json.loads((folder / CARD_DATA).read_text(encoding="utf-8"))
            try:
                for name in ("results", "controls"):
                    data[name] = None if data.get(name) is None else [Result(**result) for result in data[name]]
                return cls(**data)
            except (TypeError, AttributeError) as error:
                raise ValueError(f"{folder / CARD_DATA} is not what a card says: {error}. Remove it.") from error
        config = folder / "config.json"
        found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if found.get("model_type") != "ilvr":
            raise ValueError(f"{folder} holds no ILVR checkpoint: it has no config.json of one. Name what was saved.")
        state, adapter = folder / "trainer_state.json", folder / "adapter_config.json"
        steps = json.loads(state.read_text(encoding="utf-8"))["global_step"] if state.is_file() else None
        return cls(
            model_name=folder.resolve().name,
            latent_size=found["latent_size"],
            training=None if steps is None else {"optimizer steps": steps},
            is_adapter=adapter.is_file(),
        )
