"""The official checkpoints, by their configs and the names and shapes of their weights, on the meta device.

`official/*.json` holds what is known of each checkpoint, and from where: its config.json, its weights (`{36}` stands
for 0 to 35), the bytes and parameters of its published files. Nothing is downloaded and no weight takes memory.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import LATENT_SIZE, encode, make_sample
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, modeling_utils

from ilvr import ILVRForConditionalGeneration


OFFICIAL = Path(__file__).parents[1] / "official"
NAMES = ["qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen3_vl_4b", "qwen3_vl_8b"]
# Length of the tokenizers, whose next ids the latent tokens get.
TOKENS = {"qwen2_5_vl": 151665, "qwen3_vl": 151669}


def read_official(name: str) -> tuple[dict, dict, dict[str, torch.Tensor]]:
    """Config, published numbers and weights (on meta, in bf16) of an official checkpoint."""
    official = json.loads((OFFICIAL / f"{name}.json").read_text())
    weights = {}
    for pattern, shape in official["checkpoint"]["weights"].items():
        count = re.search(r"\{(\d+)\}", pattern)
        for i in range(int(count[1]) if count else 1):
            key = pattern.replace(count[0], str(i)) if count else pattern
            weights[key] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return official["config"], official["checkpoint"], weights


class MetaFile:
    """Stands for `safetensors.safe_open`: a weight file of which only names, shapes and types are read."""

    weights: dict[str, torch.Tensor]

    def __init__(self, file, **options):
        pass

    def keys(self):
        return self.weights.keys()

    def get_slice(self, key):
        return self.weights[key]

    def __exit__(self, *error):
        pass


@pytest.fixture
def load(monkeypatch, tmp_path):
    """`from_backbone` on a folder with the given config, a tokenizer of the family's size, and the given weights."""

    def load(config, weights):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").touch()
        vocabulary = {str(i): i for i in range(TOKENS[config["model_type"]])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
        monkeypatch.setattr(MetaFile, "weights", weights, raising=False)
        monkeypatch.setattr(modeling_utils, "safe_open", MetaFile)
        options = {"latent_size": 8, "device_map": "meta", "dtype": torch.bfloat16}
        return ILVRForConditionalGeneration.from_backbone(tmp_path, **options)

    return load


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_finds_its_parameter(name, load):
    """`from_backbone` refuses missing, unknown and misshapen weights, as the tests below show; here there are none."""
    config, published, weights = read_official(name)
    assert len(weights) == published["num_tensors"]
    assert sum(weight.nbytes for weight in weights.values()) == published["total_size"]
    model = load(config, weights)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert sum(p.numel() for p in model.parameters()) == published["num_parameters"]

    # The smaller model of each family has no head of its own.
    tied = "lm_head.weight" not in weights
    assert tied == config["tie_word_embeddings"] == (name in ("qwen2_5_vl_3b", "qwen3_vl_4b"))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (head is embedding) == tied

    # The latent tokens take spare rows of the published embedding: nothing is resized.
    ids = (model.config.latent_start_token_id, model.config.latent_pad_token_id, model.config.latent_end_token_id)
    first = TOKENS[config["model_type"]]
    assert ids == (first, first + 1, first + 2) and model.config.latent_size == 8
    vocab_size = (config.get("text_config") or config)["vocab_size"]
    assert embedding.shape[0] == head.shape[0] == vocab_size > max(ids)


@pytest.mark.parametrize(
    ("name", "key"), [("qwen2_5_vl_3b", "visual.merger.ln_q.weight"), ("qwen3_vl_4b", "model.visual.pos_embed.weight")]
)
def test_a_renamed_weight_is_refused(name, key, load):
    config, _, weights = read_official(name)
    weights[key.replace("weight", "scale")] = weights.pop(key)
    with pytest.raises(ValueError, match=r"1 missing \(.*weight\); 1 unknown \(.*scale\)"):
        load(config, weights)


def test_a_weight_of_another_shape_is_refused(load):
    """As with weights of the 7B model beside the config of the 3B."""
    config, _, weights = read_official("qwen2_5_vl_3b")
    weights["model.norm.weight"] = torch.empty(3584, dtype=torch.bfloat16, device="meta")
    message = r"1 of another shape \(model.language_model.norm.weight \(3584,\), not \(2048,\)\)"
    with pytest.raises(ValueError, match=message):
        load(config, weights)


def test_the_oldest_hub_layout_gives_equal_logits(backbone_dir, processor, tmp_path):
    """Real weights under the names that the Hub has: `visual.…` and `model.…`, not `model.language_model.…`."""
    for file in backbone_dir.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    new = load_file(backbone_dir / "model.safetensors")
    old = {re.sub(r"^model\.(visual\.|language_model)", r"\1", key): weight for key, weight in new.items()}
    old = {re.sub(r"^language_model", "model", key): weight for key, weight in old.items()}
    assert {key.split(".")[0] for key in old} == {"visual", "model"} and "model.norm.weight" in old
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    inputs = encode(processor, [make_sample(["Right", "Up"])])
    expected, logits = (
        ILVRForConditionalGeneration.from_backbone(folder, latent_size=LATENT_SIZE)(**inputs).logits
        for folder in (backbone_dir, tmp_path)
    )
    assert logits.equal(expected)


def test_a_teacher_of_adapters_is_small(load):
    """The paper's LoRA (r 32) on the 7B model: what an fp32 teacher of the trained weights adds to a bf16 student."""
    config, _, weights = read_official("qwen2_5_vl_7b")
    model = load(config, weights)
    student = sum(p.numel() * p.element_size() for p in model.parameters())
    full_copy = sum(p.numel() * 4 for p in model.parameters())
    ids = [model.config.latent_start_token_id, model.config.latent_pad_token_id, model.config.latent_end_token_id]
    lora = LoraConfig(
        r=32, target_modules=r".*language_model.*_proj", trainable_token_indices={"embed_tokens": ids, "lm_head": ids}
    )
    wrapped = get_peft_model(model, lora, low_cpu_mem_usage=True)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all(p.device.type == "meta" for p in trained.values())
    adapter = sum(p.numel() for name, p in trained.items() if "lora_" in name)
    token_rows = sum(p.numel() for p in trained.values()) - adapter
    # Of each layer: q, o (3584 x 3584), k, v (3584 x 512), gate, up and down (3584 x 18944), times r.
    assert adapter == 28 * 32 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)) == 80_740_352
    teacher = 4 * (adapter + token_rows)
    print(
        f"student {student:,} bytes; teacher {teacher:,} = {teacher / student:.2%}, token rows {4 * token_rows:,} of "
        f"them; full fp32 copy {full_copy:,} = {full_copy / student:.0%}"
    )
    assert teacher / student <= 0.03
    assert full_copy / student >= 1.0
