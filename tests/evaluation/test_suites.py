"""Plugins of lmms-eval and VLMEvalKit: batches, settings, ends, controls; with the real lmms-eval where it is."""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec

import pytest
import suite_interfaces
import torch
from helpers import make_image

from ilvr.evaluation import answer_batch
from ilvr.evaluation.suites.answering import LATENTS, Answering, decoding


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    """A random model that makes spans."""
    model.generation_config.sequence_bias = [[[processor.latent_token_ids[0]], 6.0]]
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def with_modules(monkeypatch, modules, name):
    """Imports a plugin, anew, beside the modules that it extends."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, name, raising=False)
    plugin = import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return plugin


@pytest.fixture
def lmms(monkeypatch):
    return with_modules(monkeypatch, suite_interfaces.LMMS_EVAL, "ilvr.evaluation.suites.lmms_eval_model")


DOCS = [{"image": make_image(color), "words": words} for color, words in zip(("red", "blue", "green"), "abc")]


def messages_of(doc):
    parts = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": f"Plan {doc['words']}"}]
    return [{"role": "user", "content": parts}]


def requests_for(asked):
    return [
        suite_interfaces.Instance(("", messages_of, settings, number, "boards", "test"))
        for number, settings in enumerate(asked)
    ]


def expected(model, processor, **settings):
    """The answers, one by one."""
    samples = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Plan {d['words']}"}]}
            ],
            "images": [d["image"]],
        }
        for d in DOCS
    ]
    return [answer_batch(model, processor, [sample], **settings)[0] for sample in samples]


def test_lmms_eval_answers_in_order_with_the_settings_of_each_task(lmms, checkpoint, model, processor):
    plugin = lmms.ILVR(checkpoint, batch_size="2", device="cpu", max_batch_size=None)
    plugin.task_dict = {"boards": {"test": DOCS}}
    assert not plugin.is_simple and plugin.batch_size == 2 and plugin.device == torch.device("cpu")
    long = {"max_new_tokens": 14, "do_sample": False, "temperature": 0, "top_p": None, "until": ["\n\n"]}
    found = plugin.generate_until(requests_for([long, {**long, "max_new_tokens": 5}, long]))
    whole, short = expected(model, processor, max_new_tokens=14), expected(model, processor, max_new_tokens=5)
    assert [answer.text for answer in found] == [whole[0].text, short[1].text, whole[2].text]
    assert [answer.token_counts.output_tokens for answer in found] == [
        whole[0].tokens,
        short[1].tokens,
        whole[2].tokens,
    ]
    assert all(answer.spans for answer in whole) and "latent" not in found[0].text
    assert lmms.ILVR(checkpoint, max_new_tokens=5)._settings(long) == (
        [],
        {**found_settings(long), "max_new_tokens": 5},
    )


def found_settings(asked):
    return {name: value for name, value in asked.items() if name != "until"}


def test_lmms_eval_ends_and_unknown_settings(lmms, checkpoint, caplog):
    plugin = lmms.ILVR(checkpoint)
    ends, known = plugin._settings({"until": ["\n\n", "###", ""], "image_aspect_ratio": "original"})
    assert (ends, known) == (["###"], {}) and "no meaning here: image_aspect_ratio" in caplog.text
    assert plugin._settings({"until": "."})[0] == ["."] and plugin._settings({"until": None})[0] == []
    assert lmms.cut("one\n\ntwo ### three. four", ["###", "."]) == "one\n\ntwo "
    plugin.task_dict = {"boards": {"test": DOCS}}
    (whole,) = plugin.generate_until(requests_for([{"max_new_tokens": 20}]))
    end = whole.text.strip()[-3:]
    (cut,) = plugin.generate_until(requests_for([{"max_new_tokens": 20, "until": [end]}]))
    assert cut.text == whole.text[: whole.text.index(end)]


def test_lmms_eval_refuses(lmms, checkpoint):
    with pytest.raises(ValueError, match="batch_size must be a number from 1 on, got 'auto'"):
        lmms.ILVR(checkpoint, batch_size="auto")
    with pytest.raises(ValueError, match="latents must be one of own, noise_0.1, .*, got 'other'"):
        lmms.ILVR(checkpoint, latents="other")
    plugin = lmms.ILVR(checkpoint)
    for method in (plugin.loglikelihood, plugin.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            method([])
    video = [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}]}]
    with pytest.raises(ValueError, match="has a part of type 'video'"):
        plugin.answer([video])
    shown = [*messages_of(DOCS[0]), {"role": "assistant", "content": [{"type": "image", "image": DOCS[0]["image"]}]}]
    shown[0]["content"][0]["image"] = DOCS[0]["image"]
    with pytest.raises(ValueError, match="An assistant turn of a question shows an image"):
        plugin.answer([shown])


@pytest.mark.parametrize("latents", LATENTS)
def test_latents_of_a_control(checkpoint, latents):
    """Each control comes to its own latents, and noise is another one in each batch."""
    answering = Answering(checkpoint, latents=latents)
    question = [
        {"role": "user", "content": [{"type": "image", "image": DOCS[0]["image"]}, {"type": "text", "text": "a"}]}
    ]
    settings = {"max_new_tokens": 10, "output_latents": True}
    found = [answering([question], **settings)[0].latents for _ in range(2)]
    if latents == "no_spans":
        assert len(found[0]) == 0
    elif latents == "zeros":
        assert not found[0].any()
    elif latents.startswith("noise"):
        assert not torch.equal(found[0], found[1])
    else:
        assert len(found[0]) and found[0].any() and torch.equal(found[0], found[1])


def test_decoding():
    assert decoding({"temperature": 0, "top_p": 0.9, "num_beams": None}) == {"do_sample": False}
    assert decoding({"temperature": 0.5, "top_p": 0.9}) == {"temperature": 0.5, "top_p": 0.9, "do_sample": True}
    assert decoding({"do_sample": True, "temperature": 0.0}) == {"do_sample": False}
    assert decoding({}) == {"do_sample": False}


def test_vlmevalkit(monkeypatch, checkpoint, model, processor, tmp_path):
    plugin = with_modules(monkeypatch, suite_interfaces.VLMEVAL, "ilvr.evaluation.suites.vlmevalkit_model")
    DOCS[0]["image"].save(tmp_path / "board.png")
    message = [{"type": "image", "value": str(tmp_path / "board.png")}, {"type": "text", "value": "Plan a"}]
    adapter = plugin.ILVR(checkpoint, max_new_tokens=14, temperature=0)
    assert adapter.INTERLEAVE
    assert adapter.generate(message, dataset="X") == expected(model, processor, max_new_tokens=14)[0].text
    assert isinstance(adapter.generate("words alone"), str)
    # In the suite's folder its own script runs, and finds the class where it looks.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="There is no run.py here"):
        plugin.main()
    (tmp_path / "run.py").write_text(
        "import vlmeval.vlm\nassert __name__ == '__main__'\nvlmeval.found = vlmeval.vlm.ILVR"
    )
    plugin.main()
    assert sys.modules["vlmeval"].found is plugin.ILVR


def test_lmms_eval_finds_the_plugin():
    (point,) = [point for point in entry_points(group="lmms_eval.models") if point.name == "ilvr"]
    assert point.value == "ilvr_commands.lmms_eval_manifest:manifest"


TASK = """
task: boards
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 12, temperature: 0, do_sample: false}}
process_results: !function utils.results
metric_list: [{{metric: words, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 0}}
"""
UTILS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"])]

def text(doc):
    return doc["question"]

def results(doc, found):
    return {"words": len(found[0].split())}
"""


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_lmms_eval_itself(checkpoint, tmp_path):
    """Its command, on a task of three questions, in batches of two."""
    rows = []
    for number, doc in enumerate(DOCS):
        doc["image"].save(tmp_path / f"{number}.png")
        rows.append({"image": str(tmp_path / f"{number}.png"), "question": f"Plan {doc['words']}", "answer": "R"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "boards.yaml").write_text(TASK.format(path=tmp_path / "rows.jsonl"))
    (tmp_path / "task" / "utils.py").write_text(UTILS)
    command = [
        *(
            sys.executable,
            "-m",
            "lmms_eval",
            "--model",
            "ilvr",
            "--model_args",
            f"pretrained={checkpoint},latents=zeros",
        ),
        *("--tasks", "boards", "--include_path", str(tmp_path / "task"), "--batch_size", "2", "--device", "cpu"),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "|boards|" in done.stdout.replace(" ", ""), done.stdout
    (samples,) = (tmp_path / "out").rglob("*samples_boards.jsonl")
    assert len(samples.read_text().splitlines()) == 3
