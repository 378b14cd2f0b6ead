"""The config, and what `from_pretrained` is given that is no ILVR model."""

import json
import shutil

import pytest
from helpers import LATENT_SIZE, encode, make_sample, make_trainer
from peft import LoraConfig, PeftModel

from ilvr import ILVRConfig, ILVRForConditionalGeneration, ILVRProcessor
from ilvr.trainer import ILVRTrainer, ILVRTrainingConfig
from ilvr.trainer.running.loading import load_model, load_processor


@pytest.mark.parametrize("size", [0, -1, 2.5, 1_000_000_000, True, None])
def test_latent_sizes_that_are_none(size):
    with pytest.raises((ValueError, TypeError), match="latent_size|dataclass|type"):
        ILVRConfig(latent_size=size)


@pytest.mark.parametrize("ids", [(1, 2, 2), (-1, 2, 3), (None, 2, 3), (1.5, 2, 3)])
def test_ids_that_are_no_three_numbers(ids):
    start, pad, end = ids
    with pytest.raises((ValueError, TypeError), match="three different numbers|type"):
        ILVRConfig(latent_start_token_id=start, latent_pad_token_id=pad, latent_end_token_id=end)


def test_a_config_without_ids_has_none_to_give():
    with pytest.raises(ValueError, match="has no ids of the latent tokens"):
        _ = ILVRConfig().latent_token_ids


@pytest.mark.parametrize("backbone", [None, {}, {"hidden_size": 8}, "absent"])
def test_a_config_without_a_backbone_builds_nothing(model, tmp_path, backbone):
    """The default backbone has eight billion parameters."""
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("vlm_config")
    if backbone != "absent":
        config["vlm_config"] = backbone
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no `vlm_config` with a `model_type`"):
        ILVRForConditionalGeneration.from_pretrained(tmp_path)


def test_a_plain_backbone_is_named_as_such(backbone_dir, tmp_path):
    folder = str(backbone_dir)
    with pytest.raises(ValueError, match="is a plain qwen2_5_vl backbone, not an ILVR model. .*from_backbone"):
        ILVRForConditionalGeneration.from_pretrained(folder)
    for load, name in ((load_model, "ILVRForConditionalGeneration"), (load_processor, "ILVRProcessor")):
        with pytest.raises(ValueError, match=f"is a plain qwen2_5_vl backbone.*{name}.from_backbone"):
            load(folder)
    with pytest.raises(ValueError, match="is a plain qwen2_5_vl backbone"):
        ILVRTrainer(folder, ILVRTrainingConfig(str(tmp_path), bf16=False, use_cpu=True))


@pytest.fixture
def adapter(model, processor, backbone_dir, tmp_path):
    """A trained adapter, saved; K = 3 where the default is 8."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model.name_or_path = str(backbone_dir)
    trainer = make_trainer(model, processor, tmp_path / "adapter", max_steps=1, peft_config=lora)
    trainer.train()
    trainer.save_model()
    return tmp_path / "adapter"


def test_an_adapter_comes_with_its_backbone_and_its_k(adapter, backbone_dir):
    found = ILVRForConditionalGeneration.from_pretrained(adapter)
    assert isinstance(found, PeftModel) and found.get_base_model().config.latent_size == LATENT_SIZE
    base = ILVRForConditionalGeneration.from_backbone(backbone_dir, latent_size=LATENT_SIZE)
    measured = found.get_base_model().config.latent_norm
    assert measured != base.config.latent_norm
    base.config.latent_norm = measured  # which PEFT knows nothing of
    expected = PeftModel.from_pretrained(base, adapter)
    inputs = encode(ILVRProcessor.from_pretrained(adapter), [make_sample(["Up", "Down"])])
    assert found(**inputs).logits.equal(expected(**inputs).logits)
    with pytest.raises(ValueError, match="was trained with latent_size=3, not 8"):
        ILVRForConditionalGeneration.from_pretrained(adapter, latent_size=8)


def test_an_adapter_is_trained_further_by_its_name(adapter, tmp_path):
    from helpers import make_dataset

    args = ILVRTrainingConfig(
        str(tmp_path / "out"), stage=2, max_steps=1, logging_steps=1, bf16=False, use_cpu=True, report_to="none"
    )
    trainer = ILVRTrainer(str(adapter), args, train_dataset=make_dataset())
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0 and isinstance(trainer.model, PeftModel)


def test_adapters_that_do_not_say_enough(adapter, tmp_path):
    bare = shutil.copytree(adapter, tmp_path / "bare")
    (bare / "config.json").unlink()
    with pytest.raises(ValueError, match="without the config.json of its ILVR model"):
        ILVRForConditionalGeneration.from_pretrained(bare)
    config = json.loads((adapter / "adapter_config.json").read_text())
    backbone = config.pop("base_model_name_or_path")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not name its backbone"):
        ILVRForConditionalGeneration.from_pretrained(adapter)
    assert ILVRForConditionalGeneration.from_pretrained(adapter, backbone=backbone) is not None
