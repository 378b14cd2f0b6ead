"""`ilvr generate`: what streams, what machines read, and what is refused before the model is loaded."""

import json

import pytest
import torch
from helpers import make_image
from PIL import Image as PILImage

from ilvr import ILVRForConditionalGeneration
from ilvr_commands.generate import TraceStreamer
from ilvr_commands.main import main


@pytest.fixture
def picture(tmp_path):
    make_image("red").save(tmp_path / "board.png")
    return str(tmp_path / "board.png")


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def stream(processor, *tokens) -> tuple[list[str], TraceStreamer]:
    pieces: list[str] = []
    streamer = TraceStreamer(processor, pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return pieces, streamer


def test_words_come_as_they_are_whole_and_spans_as_chips(processor):
    start, pad, end = processor.latent_token_ids
    words = processor.tokenizer("Right Down", add_special_tokens=False)["input_ids"]
    span = [start, pad, pad, pad, end]
    pieces, streamer = stream(processor, *words, *span, *span, *words, *span, processor.tokenizer.eos_token_id)
    assert streamer.trace == "".join(pieces) == "Right Down [latent 1] [latent 2] Right Down [latent 3]"
    assert streamer.spans == 3 and len(pieces) > 5
    assert stream(processor, *span, *words)[1].trace == "[latent 1] Right Down"


def test_generate(checkpoint, picture, tmp_path, monkeypatch, capsys):
    """The model opens a span, closes it, and goes on until it is cut off: the trace is what `generate` returns."""
    original = ILVRForConditionalGeneration.generate

    def open_a_span(model, *args, **kwargs):
        prompt, start = kwargs["input_ids"].shape[1], model.config.latent_start_token_id
        ids = lambda batch, row: [start] if len(row) == prompt else list(range(30, 60))  # noqa: E731
        inside = (model.config.latent_pad_token_id, model.config.latent_end_token_id)
        allowed = lambda batch, row: [*ids(batch, row), *(inside if len(row) <= prompt + 4 else ())]  # noqa: E731
        return original(model, *args, prefix_allowed_tokens_fn=allowed, **kwargs)

    monkeypatch.setattr(ILVRForConditionalGeneration, "generate", open_a_span)
    command = ["generate", checkpoint, picture, "Plan", "--max_new_tokens=8"]
    assert main([*command, "--picture", str(tmp_path / "latents.png")]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("[latent 1] ") and "cut off after 8 tokens" in shown.err
    assert "latents.png: what 1 spans of latents resemble" in shown.err
    assert (tmp_path / "latents.png").stat().st_size > 5_000
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["spans"], found["tokens"], found["finished"], found["boxed"]) == (1, 8, False, None)
    assert shown.out == f"{found['trace']}\n" and "picture" not in found
    assert found["trace"].removeprefix("[latent 1]").strip() == found["answer"].strip()


def test_all_spans_are_drawn(checkpoint, picture, tmp_path, monkeypatch):
    original = ILVRForConditionalGeneration.generate

    def open_spans(model, *args, **kwargs):
        ids = list(model.config.latent_token_ids)  # a start wherever no span is open
        return original(model, *args, prefix_allowed_tokens_fn=lambda batch, row: ids, **kwargs)

    monkeypatch.setattr(ILVRForConditionalGeneration, "generate", open_spans)
    widths = []
    for spans in (6, 7):
        tokens = spans * (ILVRForConditionalGeneration.from_pretrained(checkpoint).config.latent_size + 2)
        command = ["generate", checkpoint, picture, "Plan", f"--max_new_tokens={tokens}", "--picture"]
        assert main([*command, str(tmp_path / "latents.png")]) == 0
        widths.append(PILImage.open(tmp_path / "latents.png").width)
    assert widths[1] > widths[0]


def test_sampling_follows_the_seed(checkpoint, picture, capsys):
    def answer(*options):
        command = ["generate", checkpoint, picture, "Plan", "--max_new_tokens=12", "--json", *options]
        assert main(command) == 0
        return json.loads(capsys.readouterr().out)["answer"]

    sampled = [answer("--temperature=5", f"--seed={seed}") for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2] and answer() == answer("--seed=1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: "nowhere.png"}, "nowhere.png"),
        ({0: "runs/no/where"}, "runs/no/where"),
        ({3: "--picture=latents.pdf"}, "latents.pdf must end in .png"),
        ({3: "--picture=nowhere/latents.png"}, "folder that exists"),
    ],
)
def test_refusals(change, message, picture, monkeypatch, capsys):
    arguments = [change.get(i, given) for i, given in enumerate(("model", picture, "Plan", "--json"))]
    assert main(["generate", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ilvr generate: ")]
    assert len(lines) == 1 and message in lines[0]
