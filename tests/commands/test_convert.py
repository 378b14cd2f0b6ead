"""Conversion of checkpoints in the layout of the paper's reference code."""

import json
import os
import re

import pytest
import torch
from helpers import encode, make_sample, perturb, run_without_ilvr
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr_commands.convert import convert_checkpoint
from ilvr_commands.main import main


# In the order in which the reference code adds them, which is not ours: so the ids show whether they are kept.
TOKENS = ["<|latent_pad|>", "<|latent_start|>", "<|latent_end|>"]
SIZE = 5


def reference_checkpoint(backbone_dir, folder, tie_word_embeddings=False):
    """Writes a reference checkpoint of two `pytorch_model-….bin` shards, and returns its backbone."""
    tokenizer = AutoTokenizer.from_pretrained(backbone_dir)
    tokenizer.add_tokens(TOKENS, special_tokens=True)
    config = AutoConfig.from_pretrained(backbone_dir)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tie_word_embeddings
    torch.manual_seed(1)
    vlm = perturb(AutoModelForImageTextToText.from_config(config)).eval()
    vlm.resize_token_embeddings(len(tokenizer))
    for file in ("preprocessor_config.json", "processor_config.json", "generation_config.json"):
        if (backbone_dir / file).exists():
            (folder / file).write_bytes((backbone_dir / file).read_bytes())
    tokenizer.save_pretrained(folder)

    # The config as transformers 4.49 writes it: the text model's fields are not in a `text_config`.
    nested = vlm.config.to_dict()
    text = nested.pop("text_config")
    text["rope_theta"] = text["rope_parameters"].pop("rope_theta")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    pad, start, end = tokenizer.convert_tokens_to_ids(TOKENS)
    latent = {"latent_token_id": pad, "latent_start_id": start, "latent_end_id": end, "latent_size": SIZE}
    flat = text | nested | latent | {"compress_strategy": "average", "stage": "stage1", "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(flat))

    weights = {re.sub(r"^model\.visual\.", "visual.", key): weight for key, weight in vlm.state_dict().items()}
    weights = {re.sub(r"^model\.language_model\.", "model.", key): weight for key, weight in weights.items()}
    if tie_word_embeddings:
        del weights["lm_head.weight"]
    files = {key: f"pytorch_model-0000{1 + key.startswith('visual.')}-of-00002.bin" for key in weights}
    for file in set(files.values()):
        torch.save({key: weights[key].clone() for key in weights if files[key] == file}, folder / file)
    index = {"metadata": {"total_size": sum(weight.nbytes for weight in weights.values())}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return vlm


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def change_shard(folder, change, number=1):
    file = folder / f"pytorch_model-0000{number}-of-00002.bin"
    weights = torch.load(file)
    change(weights)
    torch.save(weights, file)


@pytest.fixture
def checkpoint(backbone_dir, tmp_path):
    folder = tmp_path / "reference"
    folder.mkdir()
    reference_checkpoint(backbone_dir, folder)
    return folder


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@torch.no_grad()
def test_conversion(backbone_dir, tmp_path, tie_word_embeddings, capsys):
    reference, out = tmp_path / "reference", tmp_path / "out"
    reference.mkdir()
    vlm = reference_checkpoint(backbone_dir, reference, tie_word_embeddings)
    main(["convert", str(reference), str(out)])
    assert "latent_size 5" in capsys.readouterr().out

    files = {file.name for file in out.iterdir()}
    assert {"model.safetensors", "modeling_ilvr.py", "processing_ilvr.py", "processor_config.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    model = ILVRForConditionalGeneration.from_pretrained(out)
    processor = ILVRProcessor.from_pretrained(out)
    pad, start, end = AutoTokenizer.from_pretrained(reference).convert_tokens_to_ids(TOKENS)
    config = model.config
    assert pad < start < end and processor.latent_token_ids == (start, pad, end)
    assert (config.latent_start_token_id, config.latent_pad_token_id, config.latent_end_token_id) == (start, pad, end)
    assert config.latent_size == processor.latent_size == SIZE
    assert config.latent_head == "identity"  # as the reference code trains
    assert not hasattr(config.vlm_config, "latent_token_id")
    assert str(tmp_path) not in (out / "config.json").read_text()

    assert model.get_input_embeddings().weight.equal(vlm.get_input_embeddings().weight)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tie_word_embeddings
    inputs = encode(processor, [make_sample(["Right", "Up"])], prompt_only=True)
    assert model(**inputs).logits.equal(vlm(**inputs).logits)

    # A span that the model is led into: its K latents and its end follow by themselves.
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[start]])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.tensor([[0]])], dim=1)
    ids = model.generate(**inputs, max_new_tokens=SIZE + 3, do_sample=False)
    assert ids[0, inputs["input_ids"].shape[1] :][: SIZE + 1].tolist() == [pad] * SIZE + [end]


def test_the_output_loads_without_ilvr(checkpoint, tmp_path):
    model = convert_checkpoint(str(checkpoint), str(tmp_path / "out"))
    inputs = encode(AutoProcessor.from_pretrained(tmp_path / "out"), [make_sample(["x"])], prompt_only=True)
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    run_without_ilvr(
        f"""
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
AutoProcessor.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
torch.save(model(**torch.load({str(tmp_path / "inputs.pt")!r})).logits, {str(tmp_path / "logits.pt")!r})
""",
        tmp_path / "modules",
    )
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(**inputs).logits)


def test_one_file_and_another_dtype(checkpoint, tmp_path):
    """A small checkpoint is one `pytorch_model.bin` without an index."""
    whole = {}
    for file in sorted(checkpoint.glob("pytorch_model-*.bin")):
        whole |= torch.load(file)
        file.unlink()
    (checkpoint / "pytorch_model.bin.index.json").unlink()
    torch.save(whole, checkpoint / "pytorch_model.bin")
    convert_checkpoint(str(checkpoint), str(tmp_path / "out"), dtype="bfloat16")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.vlm.lm_head.weight.equal(whole["lm_head.weight"].bfloat16())


def test_a_shard_is_missing(checkpoint, tmp_path):
    (checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="names 2 weight files, of which .* lacks pytorch_model-00002-of-00002.bin"):
        convert_checkpoint(str(checkpoint), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"1 missing \(.*layers.1.mlp.up_proj.weight\)"),
        (lambda w: w.update({"model.extra.weight": torch.ones(1)}), r"1 unknown \(.*extra.weight\)"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(16)}),
            r"1 of another shape \(.*norm.weight \(16,\), not \(32,\)\)",
        ),
        (lambda w: w.clear(), r"\d+ missing \(lm_head.weight, .*, …\)"),
    ],
    ids=["missing", "unknown", "shape", "empty"],
)
def test_weights_that_do_not_fit(checkpoint, tmp_path, change, message):
    """Loading such a checkpoint would quietly go on from random weights."""
    change_shard(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_embeddings_that_were_not_resized(checkpoint, tmp_path):
    """A config and weights of the plain backbone beside a tokenizer with the latent tokens."""
    rows = AutoConfig.from_pretrained(checkpoint).text_config.vocab_size - len(TOKENS)

    def cut(weights):
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[key] = weights[key][:rows].clone()

    change_shard(checkpoint, cut)
    change_config(checkpoint, vocab_size=rows)
    with pytest.raises(ValueError, match=f"embeddings of {rows} rows"):
        convert_checkpoint(str(checkpoint), str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["latent_token_id", "latent_start_id", "latent_end_id", "latent_size"])
def test_a_config_field_is_missing(checkpoint, tmp_path, name):
    change_config(checkpoint, **{name: None})
    with pytest.raises(ValueError, match=f"has no {name}, which the reference code writes"):
        convert_checkpoint(str(checkpoint), str(tmp_path / "out"))


def test_a_plain_backbone(backbone_dir, tmp_path):
    with pytest.raises(ValueError, match="A plain backbone needs no conversion"):
        convert_checkpoint(str(backbone_dir), str(tmp_path / "out"))


def test_the_tokenizer_of_the_plain_backbone(backbone_dir, checkpoint, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / file).write_bytes((backbone_dir / file).read_bytes())
    with pytest.raises(ValueError, match="Use the tokenizer that was saved with the checkpoint"):
        convert_checkpoint(str(checkpoint), str(tmp_path / "out"))


class Malicious:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_with_code_is_refused(checkpoint, tmp_path):
    trace = str(tmp_path / "code-ran")
    change_shard(checkpoint, lambda weights: weights.update({"model.norm.weight": Malicious(trace)}))
    with pytest.raises(ValueError, match="holds more than tensors, and is not loaded"):
        convert_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert not os.path.exists(trace) and not (tmp_path / "out").exists()
    # The control: without weights-only loading the code of this file runs.
    torch.load(checkpoint / "pytorch_model-00001-of-00002.bin", weights_only=False)
    assert os.path.exists(trace)


def test_the_output_folder_is_new(checkpoint):
    with pytest.raises(ValueError, match="is not empty: give a new `output_dir`"):
        convert_checkpoint(str(checkpoint), str(checkpoint))


def test_errors_are_one_line(checkpoint, backbone_dir, tmp_path, capsys):
    for arguments, message in (
        (["a", "b", "c"], "unknown arguments: c"),
        ([str(backbone_dir), str(tmp_path / "out")], "has no latent_token_id"),
        ([str(checkpoint), str(checkpoint)], "is not empty"),
    ):
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("ilvr convert: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("index", [[], {}, {"weight_map": {"a": 3}}])
def test_an_index_that_names_no_files(checkpoint, tmp_path, index):
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not say which file holds which weight"):
        convert_checkpoint(str(checkpoint), str(tmp_path / "out"))
