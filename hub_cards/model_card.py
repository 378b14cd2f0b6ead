"""The model card of an ILVR checkpoint: data rendered by a template."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData


TEMPLATE = Path(__file__).parent / "model_card_template.md"
PACKAGES = ("ilvr", "torch", "transformers", "trl", "peft", "datasets")


@dataclass
class Result:
    """One measured number.

    Args:
        task (`str`): what was measured, such as `"FrozenLake planning, 3x3"`.
        metric (`str`): its name, such as `"end_on_goal"`.
        value (`float`): between 0 and 1.
        count (`int`): number of samples.
        low, high (`float`, *optional*): 95 % interval.
        dataset (`str`, *optional*): Hub id or name of the data.
    """

    task: str
    metric: str
    value: float
    count: int
    low: float | None = None
    high: float | None = None
    dataset: str = "frozen-lake"


@dataclass
class ILVRModelCard:
    """What a card says. `save` writes it as `README.md` into a checkpoint's folder.

    Args:
        model_name (`str`): heading of the card.
        latent_size (`int`): K.
        repo_id (`str`, *optional*, defaults to `model_name`): what the code of the card loads.
        base_model (`str`, *optional*): Hub id of the backbone; `None` for one built from scratch.
        license (`str`, *optional*, defaults to `"apache-2.0"`): of the weights; that of the base model binds.
        dataset (`str`, *optional*): Hub id of the training data.
        training (`dict`, *optional*): settings, shown as a table.
        results (`list[Result]`, *optional*): measured numbers.
        example_prompt, example_image (`str`, *optional*): used in the code.
    """

    model_name: str
    latent_size: int
    repo_id: str | None = None
    base_model: str | None = None
    license: str = "apache-2.0"
    dataset: str | None = None
    training: dict | None = None
    results: list[Result] | None = None
    example_prompt: str = "What happens next in this picture?"
    example_image: str = "picture.png"

    def render(self) -> ModelCard:
        evaluated = [
            EvalResult(
                task_type="image-text-to-text",
                task_name=result.task,
                dataset_type=result.dataset,
                dataset_name=result.dataset,
                metric_type=result.metric,
                metric_value=round(result.value, 4),
            )
            for result in self.results or []
        ]
        data = ModelCardData(
            library_name="transformers",
            pipeline_tag="image-text-to-text",
            tags=["ilvr", "latent-visual-reasoning", "custom_code"],
            license=self.license,
            base_model=self.base_model,
            datasets=self.dataset,
            model_name=self.model_name,
            eval_results=evaluated or None,
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
            example_prompt=self.example_prompt,
            example_image=self.example_image,
            versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
        )

    def save(self, folder: str | Path):
        self.render().save(Path(folder) / "README.md")
