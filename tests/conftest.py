"""Tiny random models for all tests: nothing is downloaded, nothing needs a network."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")

import pytest
import torch
from backbones import CHAT_TEMPLATES, build_backbone
from PIL import Image
from transformers.utils import logging

from ilvr import ILVRForConditionalGeneration, ILVRProcessor


LATENT_SIZE = 3

logging.disable_progress_bar()
torch.set_num_threads(1)  # for tiny models a second thread only waits


def pytest_generate_tests(metafunc):
    """Runs the tests of a module with a list `BACKBONES` on each of them, unless a test names some; others on one."""
    backbones = getattr(metafunc.module, "BACKBONES", None)
    named = any("backbone_name" in marker.args for marker in metafunc.definition.iter_markers("parametrize"))
    if backbones and "backbone_name" in metafunc.fixturenames and not named:
        metafunc.parametrize("backbone_name", backbones, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backbone_name(request):
    return getattr(request, "param", "qwen2_5_vl")


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory, backbone_name):
    return build_backbone(backbone_name, tmp_path_factory.mktemp("backbones") / backbone_name)


@pytest.fixture(scope="session")
def processor(backbone_dir, backbone_name):
    template = CHAT_TEMPLATES.get(backbone_name)
    return ILVRProcessor.from_backbone(backbone_dir, latent_size=LATENT_SIZE, chat_template=template)


@pytest.fixture(scope="session")
def _model(backbone_dir):
    return perturb(ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=LATENT_SIZE))


@pytest.fixture
def model(_model):
    """A fresh copy a test may train or break."""
    import copy

    return copy.deepcopy(_model)


def perturb(model, scale: float = 0.2, seed: int = 1):
    """Moves all weights away from their initial values, where biases are 0, norms 1 and outputs nearly constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter) * 0.5)
    return model


def make_image(color: str, size: int = 32) -> Image.Image:
    """An image with a coloured corner; 32 pixels are 2 x 2 visual tokens."""
    image = Image.new("RGB", (size, size), "white")
    image.paste(color, (0, 0, size // 2, size // 3))
    return image


def make_sample(words: list[str], question: str = "Plan", size: int = 32) -> dict:
    """A sample whose assistant says `words` with a helper image between each two of them."""
    colors = ["red", "green", "blue", "black", "orange", "purple"]
    content, images = [], [make_image("gray", size)]
    for i, word in enumerate(words):
        if i:
            content.append({"type": "image", "text": None})
            images.append(make_image(colors[i % 6], size))
        content.append({"type": "text", "text": word})
    user = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": content}]
    return {"messages": messages, "images": images}


def encode(processor, samples: list[dict], padding_side: str = "right", prompt_only: bool = False):
    """Model inputs of a batch of samples."""
    conversations = []
    for sample in samples:
        user, assistant = sample["messages"]
        parts = [{"type": "image", "image": sample["images"][0]}, *user["content"][1:]]
        user = {"role": "user", "content": parts}
        conversations.append([user] if prompt_only else [user, assistant])
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=prompt_only,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )
