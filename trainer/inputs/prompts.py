"""From conversations to the prompts that reinforcement learning starts from, and their order."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, Image, List
from torch.utils.data import Sampler

from ilvr.data.conversations import image_roles


def make_prompts(dataset: Dataset, reference: Callable[[dict[str, Any]], Any] | None = None) -> Dataset:
    """The first question of each conversation, as [`ILVRGRPOTrainer`] takes it.

    Args:
        dataset (`Dataset`): conversations as [`~ilvr.data.load_conversations`] gives them, or a task.
        reference (`Callable`, *optional*, defaults to the sample's `answer`): what a metric compares answers with,
            such as [`~ilvr.tasks.Task.reference`].

    Returns:
        `Dataset` with the columns `prompt` (the turns before the first of the assistant), `images` (theirs, without
        helper images), `reference`, and `has_spans`: whether the conversation has a helper image.

    Raises:
        ValueError: if a conversation has fewer images than image parts before the first answer.
    """

    def change(sample: dict[str, Any]) -> dict[str, Any]:
        turns = [message["role"] for message in sample["messages"]]
        prompt = sample["messages"][: turns.index("assistant") if "assistant" in turns else None]
        num_images = len(image_roles(prompt))
        if len(sample["images"]) < num_images:
            raise ValueError(f"The prompt has {num_images} image parts for {len(sample['images'])} images.")
        return {
            "prompt": prompt,
            "images": sample["images"][:num_images],
            "reference": sample["answer"] if reference is None else reference(sample),
            "has_spans": "assistant" in image_roles(sample["messages"]),
        }

    encoded = dataset.cast_column("images", List(Image(decode=False)))
    prompts = encoded.map(change, remove_columns=dataset.column_names, desc="Prompts")
    return prompts.cast_column("images", List(Image()))


class SeededByEpoch(Sampler):
    """TRL's repeated prompts in an order of their epoch.

    The order of an epoch is else what the epochs before have left of a generator, and a run that is resumed in the
    second epoch starts with the order of the first.

    Args:
        sampler ([`~trl.trainer.utils.RepeatSampler`]).
        seed (`int`): of the order, together with the epoch.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.seed + self.epoch)
        yield from self.sampler
