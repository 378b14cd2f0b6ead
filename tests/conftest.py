"""Tiny random models for all tests: nothing is downloaded, nothing needs a network."""

import gc
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")

import datasets
import pytest
import torch
from backbones import CHAT_TEMPLATES, build_backbone
from helpers import make_image, perturb
from transformers.utils import logging

from ilvr import ILVRForConditionalGeneration, ILVRProcessor


LATENT_SIZE = 3

logging.disable_progress_bar()
torch.set_num_threads(1)  # for tiny models a second thread only waits


def pytest_collection_finish(session):
    """What was imported stays: a training collects garbage several times, and would walk all of torch each time."""
    gc.freeze()


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


@pytest.fixture
def image_root(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    make_image("gray").save(root / "board.png")
    make_image("red").save(root / "step 1.png")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
