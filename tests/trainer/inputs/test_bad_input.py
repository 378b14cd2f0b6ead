"""Bad input gets an error that names the sample and the remedy, before training starts."""

import copy
import re

import pytest
from datasets import Dataset, Features, Image, List, Value
from helpers import make_dataset, make_sample
from transformers import BertConfig

from ilvr import ILVRConfig, ILVRForConditionalGeneration, ILVRProcessor
from ilvr.trainer import ILVRTrainer, ILVRTrainingConfig
from ilvr.trainer.inputs.data_preparation import prepare_dataset


GOOD = make_sample(["Right", "Up"])


def start_training(model, processor, samples, folder, **kwargs):
    """What a user does; fails before `train()` if it fails as it should."""
    dataset = make_dataset(samples)
    args = ILVRTrainingConfig(
        str(folder), **{"stage": 1, "bf16": False, "report_to": "none", "use_cpu": True, **kwargs}
    )
    return ILVRTrainer(model, args, train_dataset=dataset, processing_class=processor)


def broken(**changes):
    return {**copy.deepcopy(GOOD), **changes}


def test_the_good_sample_is_good(model, processor, tmp_path):
    start_training(model, processor, [GOOD, GOOD], tmp_path)


def test_missing_image_file(model, processor, tmp_path):
    features = Features(
        {
            "messages": List(
                {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
            ),
            "images": List(Image(decode=False)),
        }
    )
    lost = [{"path": str(tmp_path / "lost.png"), "bytes": None}] * 2
    dataset = Dataset.from_list([broken(images=lost)], features=features)
    args = ILVRTrainingConfig(str(tmp_path), bf16=False, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"Sample 0 of the train data, image 0: there is no file .*lost.png"):
        ILVRTrainer(model, args, train_dataset=dataset, processing_class=processor)


def test_corrupt_image(model, processor, tmp_path):
    features = Features(
        {
            "messages": List(
                {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
            ),
            "images": List(Image(decode=False)),
        }
    )
    noise = [{"path": None, "bytes": b"no picture"}] * 2
    dataset = Dataset.from_list([broken(images=noise)], features=features)
    args = ILVRTrainingConfig(str(tmp_path), bf16=False, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"Sample 0 of the train data, image 0 \(bytes\) is no image .* Replace it"):
        ILVRTrainer(model, args, train_dataset=dataset, processing_class=processor)


def test_image_part_without_an_image(model, processor, tmp_path):
    with pytest.raises(ValueError, match="Sample 1 of the train data has 2 image parts in its messages but 1 images"):
        start_training(model, processor, [GOOD, broken(images=GOOD["images"][:1])], tmp_path)


def test_more_images_than_parts(model, processor, tmp_path):
    with pytest.raises(ValueError, match="Sample 1 of the train data has 2 image parts in its messages but 4 images"):
        start_training(model, processor, [GOOD, broken(images=GOOD["images"] * 2)], tmp_path)


def test_trace_without_helper_images_in_stage_1(model, processor, tmp_path):
    with pytest.raises(ValueError, match="No sample of the train data has an image in an assistant turn.*stage 2"):
        start_training(model, processor, [make_sample(["Right"])] * 2, tmp_path)


def test_over_long_samples_are_dropped_counted_and_listed(model, processor, tmp_path, monkeypatch):
    """Never cut: a cut could fall into a span or an image."""
    messages = []
    monkeypatch.setattr("ilvr.trainer.inputs.data_preparation.logger.warning", messages.append)
    long = make_sample(["Right " * 60, "Up"])
    trainer = start_training(model, processor, [GOOD, long, GOOD, long], tmp_path, max_length=60)
    assert len(trainer.train_dataset) == 2 and max(trainer.train_dataset["length"]) <= 60
    (message,) = messages
    assert re.match(
        r"2 of 4 samples of the train data .* max_length=60 .* 1 \(\d+ tokens\), 3 \(\d+ tokens\)", message
    )
    with pytest.raises(ValueError, match=r"All 1 samples of the train data are longer than max_length=60"):
        start_training(model, processor, [long], tmp_path, max_length=60)


def test_over_long_samples_of_a_stream_are_dropped_and_listed(processor, monkeypatch):
    messages = []
    monkeypatch.setattr("ilvr.trainer.inputs.data_preparation.logger.warning", messages.append)
    stream = make_dataset([GOOD, make_sample(["Right " * 60, "Up"]), GOOD]).to_iterable_dataset()
    kept = list(prepare_dataset(stream, processor, stage=1, max_length=60))
    assert len(kept) == 2
    assert len(messages) == 1 and "Sample 1 of the train data is dropped" in messages[0]


def test_latent_ids_in_user_text(model, processor, tmp_path):
    sample = make_sample(["Right", "Up"], question="Go <|latent_start|><|latent_pad|>")
    with pytest.raises(ValueError, match=r"Sample 1 .*: messages: The user text .* holds <\|latent_start\|>"):
        start_training(model, processor, [GOOD, sample], tmp_path)


def test_nothing_to_learn_from(model, processor, tmp_path):
    sample = broken(messages=GOOD["messages"][:1], images=GOOD["images"][:1])
    with pytest.raises(ValueError, match="no words of the assistant"):
        start_training(model, processor, [sample], tmp_path, stage=2)


def test_columns_are_missing(model, processor, tmp_path):
    dataset = Dataset.from_dict({"text": ["a"]})
    args = ILVRTrainingConfig(str(tmp_path), bf16=False, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="needs a column `messages`"):
        ILVRTrainer(model, args, train_dataset=dataset, processing_class=processor)


def test_unknown_backbone(tmp_path):
    with pytest.raises(ValueError, match="BertConfig is not an image-text-to-text backbone"):
        ILVRForConditionalGeneration(ILVRConfig(vlm_config=BertConfig(num_hidden_layers=1)))
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a vision-language model"):
        ILVRProcessor.from_backbone(str(tmp_path))


def test_latent_size_that_disagrees(model, backbone_dir, tmp_path):
    other = ILVRProcessor.from_backbone(backbone_dir, latent_size=5)
    with pytest.raises(ValueError, match="model's latent_size is 3, the processor's 5"):
        start_training(model, other, [GOOD], tmp_path)


def test_latent_size_that_disagrees_with_a_reference_checkpoint(backbone_dir, tmp_path):
    """The reference code writes latent ids and size into the backbone's own config."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    processor = ILVRProcessor.from_backbone(backbone_dir, latent_size=6)
    vlm = AutoModelForImageTextToText.from_pretrained(backbone_dir)
    start, pad, end = processor.latent_token_ids
    vlm.resize_token_embeddings(end + 1)
    vlm.config.update({"latent_start_id": start, "latent_token_id": pad, "latent_end_id": end, "latent_size": 6})
    for part in (vlm, processor.tokenizer, processor.image_processor):
        part.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).latent_token_id == pad
    model = ILVRForConditionalGeneration.from_backbone(tmp_path)
    assert model.config.latent_size == 6 and model.config.latent_pad_token_id == pad
    assert model.get_input_embeddings().weight.equal(vlm.get_input_embeddings().weight)
    for build in (ILVRForConditionalGeneration, ILVRProcessor):
        with pytest.raises(ValueError, match="latent_size=4 disagrees with the checkpoint, which was trained with 6"):
            build.from_backbone(tmp_path, latent_size=4)


def test_contradictory_arguments(tmp_path):
    for arguments, message in (
        ({"stage": 3}, "`stage` must be 1"),
        ({"selection_method": "best"}, "`selection_method` must be one of"),
        ({"teacher_decay": 1.0}, "`teacher_decay` must lie in"),
        ({"selection_temperature": 0.0}, "`selection_temperature` above 0"),
        ({"packing": True}, "`packing`"),
    ):
        with pytest.raises(ValueError, match=message):
            ILVRTrainingConfig(str(tmp_path), bf16=False, **arguments)
