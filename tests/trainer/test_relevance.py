"""What in a picture the model's own answer depends on."""

import copy

import pytest
import torch
from helpers import ask_about, make_dataset, make_sample, make_trainer

from ilvr.trainer.inputs.columns import HELPER_ANSWERS, HELPER_PROMPTS
from ilvr.trainer.inputs.data_preparation import prepare_dataset
from ilvr.trainer.inputs.helper_prompts import add_helper_prompts
from ilvr.trainer.inputs.image_features import image_outputs, without_pixels
from ilvr.trainer.relevance import AnswerAttention, AnswerGradient, AnswerOcclusion, AskedPictures


BACKBONES = ("qwen2_5_vl", "qwen3_vl", "smolvlm")
SAMPLE = make_sample(["Right", "Down", "Up Left"])  # two helper images
QUESTIONS = ["Where is the goal?", "Right"]  # of different lengths, so that one is padded


@pytest.fixture
def asked(model, processor):
    """The model in double precision, and a batch of two pictures with a question about each."""
    model = model.double().eval()
    rows = make_dataset([{**SAMPLE, "metadata": '{"helper_questions": ["Where is the goal?", "Right"]}'}])
    rows = add_helper_prompts(prepare_dataset(rows, processor, stage=1), processor, question=None)
    return model, helper_inputs(rows, processor)


def helper_inputs(rows, processor):
    from ilvr.trainer.inputs.data_collator import LatentBatch, LatentDataCollator

    inputs = LatentBatch.of(LatentDataCollator(processor)(list(rows))).helper_inputs
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def eagerly(model, inputs):
    """In single precision: eager attention masks padding by the least number, which is none in another precision."""
    model.float().set_attn_implementation("eager")
    return model, {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}


def gradient_norms(model, inputs, max_new_tokens=0, answer=None):
    """Norms (N,) of the gradient of the log-probability of the model's own answer, or of one that is given (1, A), at
    each patch's states, summed over the layers: the gradient of what is added to the output of each layer."""
    prompt = inputs["input_ids"].shape[1]
    pixels = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    no_spans = {"suppress_tokens": [model.config.latent_start_token_id]}
    if answer is None:
        answer = model.generate(**pixels, do_sample=False, max_new_tokens=max_new_tokens, **no_spans)[:, prompt:]
    ids = torch.cat([pixels["input_ids"], answer], dim=1)
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in pixels:
            pixels[name] = torch.cat([pixels[name], torch.full_like(answer, name == "attention_mask")], dim=1)
    layers = model.model.core.get_decoder().layers
    shape = (*ids.shape, model.config.get_text_config().hidden_size)
    added = [torch.zeros(shape, dtype=torch.double, requires_grad=True) for _ in layers]

    def adds(own):
        return lambda module, arguments, output: (
            (output[0] + own, *output[1:]) if isinstance(output, tuple) else output + own
        )

    hooks = [layer.register_forward_hook(adds(own)) for layer, own in zip(layers, added)]
    logits = model(**{**pixels, "input_ids": ids}, use_cache=False).logits[:, prompt - 1 : -1]
    for hook in hooks:
        hook.remove()
    logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).sum().backward()
    is_image = ids == model.config.image_token_id
    return torch.stack([own.grad.norm(dim=-1) for own in added]).sum(0)[is_image]


def test_relevance_is_the_norm_of_the_answers_gradient(asked, processor):
    """Two pictures at once, a padded question: as each alone, on inputs of the processor, by what states are added."""
    model, inputs = asked
    assert (inputs["prompt_mask"] == 0).any() and len(inputs["prompt_ids"]) == 2
    relevances = AnswerGradient(model, 3)(inputs, image_outputs(inputs, model.model.core))
    for image, question, found in zip(SAMPLE["images"][1:], QUESTIONS, relevances):
        expected = gradient_norms(model, ask_about(processor, image, question), 3).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert expected.max() > 1.05 * expected.min() > 0


def test_relevance_is_the_attention_of_the_answer(asked, processor):
    """The columns that say the answer, the last of the prompt and the first two of three words, on inputs of the
    processor for one picture; a mean over layers and heads."""
    model, inputs = asked
    with pytest.raises(ValueError, match="'sdpa' returns none. Load the model with attn_implementation='eager'"):
        AnswerAttention(model, 3)
    model, inputs = eagerly(model, inputs)
    relevances = AnswerAttention(model, 3)(inputs, image_outputs(inputs, model.model.core))
    for image, question, found in zip(SAMPLE["images"][1:], QUESTIONS, relevances, strict=True):
        alone = ask_about(processor, image, question)
        expected, prompt = 0, alone["input_ids"].shape[1]
        for words in range(3):
            options = {"max_new_tokens": words + 1, "suppress_tokens": [model.config.latent_start_token_id]}
            answered = model.generate(
                **alone, do_sample=False, output_attentions=True, return_dict_in_generate=True, **options
            )
            steps = [torch.stack(layers)[:, 0, :, -1].mean((0, 1)) for layers in answered.attentions]  # (T so far,)
            expected = expected + steps[-1][:prompt][alone["input_ids"][0] == model.config.image_token_id] / 3
        torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-6)


def losses_by_hiding(model, inputs, features, max_new_tokens):
    """What the model's answer loses of its log-probability (N,), with one row of `features` after the other, which are
    tensors (N, D) that the forward reads, in the place of the mean of the others."""
    no_spans = {"suppress_tokens": [model.config.latent_start_token_id]}
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, **no_spans)
    answer = answer[:, inputs["input_ids"].shape[1] :]
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], dim=1)}
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in whole:
            whole[name] = torch.cat([whole[name], torch.full_like(answer, name == "attention_mask")], dim=1)

    def log_prob():
        logits = model(**whole, use_cache=False).logits[:, -len(answer[0]) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).sum()

    said, lost = log_prob(), []
    for patch in range(len(features[0])):
        kept = [values[patch].clone() for values in features]
        for values in features:
            values[patch] = values[torch.arange(len(values)) != patch].mean(0)
        lost.append(said - log_prob())
        for values, own in zip(features, kept):
            values[patch] = own
    return torch.stack(lost)


@torch.no_grad()
def test_relevance_is_what_the_answer_loses_when_a_patch_is_hidden(asked, processor):
    """Two pictures at once, a padded question; deepstack features are hidden, too; plus shares of the gradient."""
    model, inputs = asked
    core = model.model.core
    outputs = image_outputs(inputs, core)
    gradients = AnswerGradient(model, 3)(inputs, outputs)
    relevances = AnswerOcclusion(model, 3)(inputs, outputs)
    for image, question, own, found in zip(SAMPLE["images"][1:], QUESTIONS, gradients, relevances):
        alone = ask_about(processor, image, question)
        alone = {k: v.double() if v.is_floating_point() else v for k, v in alone.items()}
        encoded = image_outputs({k: v for k, v in alone.items() if k.startswith(("pixel", "image"))}, core)
        features = encoded.pooler_output
        features = [features.flatten(0, -2)] if isinstance(features, torch.Tensor) else [features[0]]
        for layer in getattr(encoded, "deepstack_features", None) or ():
            features.append(layer if isinstance(layer, torch.Tensor) else layer[0])
        alone = {**without_pixels(alone), "mm_encoder_outputs": {"image": encoded}}
        lost = losses_by_hiding(model, alone, features, 3)
        expected = lost.clamp(min=0) / 0.01 + own / own.sum()
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-4)
        assert lost.max() > 1e-3


@pytest.mark.parametrize(("bound", "latent_size", "hidden"), [(-1, 1, 1), (-1, 3, 3), (1e9, 3, None)])
def test_the_search_is_over_when_a_span_is_full(asked, monkeypatch, bound, latent_size, hidden):
    """Patches that lose enough, as many as a span has latents; else all patches are hidden."""
    model, inputs = asked
    outputs, rows, log_probs = image_outputs(inputs, model.model.core), [], AskedPictures.log_probs
    gradients, whole = (kind(model, 3)(inputs, outputs) for kind in (AnswerGradient, AnswerOcclusion))
    monkeypatch.setattr("ilvr.trainer.relevance.LARGE_LOSS", bound)
    monkeypatch.setattr(model.config, "latent_size", latent_size)
    monkeypatch.setattr(AskedPictures, "log_probs", lambda *a: rows.append(len(a[1])) or log_probs(*a))
    found = AnswerOcclusion(model, 3)(inputs, outputs)
    hidden = hidden or len(found[0])
    assert rows == [2, 2] + [2] * hidden  # the gradient's, that of whole pictures, and of hidden patches
    for own, norms, all_patches in zip(found, gradients, whole):
        first = norms.argsort(descending=True)[:hidden]
        expected = (norms / norms.sum()).index_copy(0, first, all_patches[first])
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)


def test_an_answer_counts_up_to_its_end(asked, monkeypatch):
    """Answers of different lengths in a batch: each picture as alone, and what comes after the end has no say."""
    model, inputs = asked
    outputs = image_outputs(inputs, model.model.core)
    answers = []
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda *a, **k: answers.append(generate(*a, **k)) or answers[-1])
    whole = AnswerGradient(model, 4)(inputs, outputs)
    said = answers[0][:, inputs["prompt_ids"].shape[1] :]
    # The second word of the first answer becomes the end; the other row must not say it as early.
    end = int(said[0, 1])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    cut = AnswerGradient(model, 4)(inputs, outputs)
    length = [row.tolist().index(end) + 1 if end in row else 4 for row in said]
    assert length[0] <= 2
    for row, found in enumerate(cut):
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)
        only_words = AnswerGradient(model, length[row])(inputs, outputs)[row]
        torch.testing.assert_close(found, only_words, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(cut[0], whole[0], rtol=1e-2)


@pytest.mark.parametrize("relevance", [AnswerGradient, AnswerOcclusion, AnswerAttention])
def test_many_pictures_are_taken_a_few_at_a_time(asked, monkeypatch, relevance):
    model, inputs = asked
    model, inputs = eagerly(model, inputs)
    outputs = image_outputs(inputs, model.model.core)
    whole = relevance(model, 3)(inputs, outputs)
    monkeypatch.setattr("ilvr.trainer.relevance.TOKENS_AT_ONCE", 1)
    monkeypatch.setattr("ilvr.trainer.relevance.WEIGHTS_AT_ONCE", 1)
    for one, other in zip(relevance(model, 3)(inputs, outputs), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_asked_and_not_the_student(model, processor, tmp_path):
    settings = {"selection_method": "answer_gradient", "helper_question": "Right", "max_helper_answer_tokens": 3}
    trainer = make_trainer(model, processor, tmp_path, **settings)
    batch = trainer._batch_of([trainer.train_dataset[i] for i in range(2)])
    ask = trainer.select_targets.relevance
    outputs = image_outputs(batch.helper_inputs, trainer.select_targets.core)
    before = torch.cat(ask(batch.helper_inputs, outputs))
    with torch.no_grad():
        for weight in trainer.teacher.parameters():
            weight.mul_(1.1)
        after = torch.cat(ask(batch.helper_inputs, outputs))
        for weight in model.model.core.get_decoder().parameters():
            weight.mul_(1.1)
    assert not torch.allclose(after, before, rtol=1e-3)
    torch.testing.assert_close(torch.cat(ask(batch.helper_inputs, outputs)), after)
    assert not any(p.grad is not None for p in model.parameters())


def test_relevance_to_the_rest_of_the_trace(model, processor):
    """Answers of different lengths, beside a row with questions, which the model answers itself; each as alone."""
    model = model.double().eval()
    metadata = ["{}", '{"helper_questions": ["Where is the goal?", "Right"]}']
    samples = make_dataset([{**SAMPLE, "metadata": own} for own in metadata])
    rows = add_helper_prompts(prepare_dataset(samples, processor, stage=1), processor, question=None)
    inputs = helper_inputs(rows, processor)
    first, second, *others = inputs["answer_mask"].sum(1).tolist()
    assert first > second > 0 and others == [0, 0]
    found = AnswerGradient(model, 2)(inputs, image_outputs(inputs, model.model.core))
    for i, image in enumerate(SAMPLE["images"][1:]):
        alone, answer = ask_about(processor, image, "Plan"), torch.tensor([rows[0][HELPER_ANSWERS][i]])
        more = len(rows[0][HELPER_PROMPTS][i]) - alone["input_ids"].shape[1]  # words before the picture
        alone["input_ids"] = torch.tensor([rows[0][HELPER_PROMPTS][i]])
        for name in {"attention_mask", "mm_token_type_ids"} & set(alone):
            added = alone[name].new_full((1, more), name == "attention_mask")
            alone[name] = torch.cat([alone[name], added], dim=1)
        expected = gradient_norms(model, alone, answer=answer).float()
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-6)
        expected = gradient_norms(model, ask_about(processor, image, QUESTIONS[i]), 2).float()
        torch.testing.assert_close(found[2 + i], expected, rtol=1e-4, atol=1e-6)


def test_training_without_a_question(model, processor, tmp_path, monkeypatch):
    """The model is not asked, and selects the same at each step, once, and of cached images."""
    monkeypatch.setattr(type(model), "generate", None)
    found = []
    for settings in ({}, {"selection_schedule": "once"}, {"cache_images": True}):
        own = copy.deepcopy(model)
        trainer = make_trainer(own, processor, tmp_path, selection_method="answer_gradient", max_steps=1, **settings)
        selection = trainer.select_targets(trainer._batch_of([trainer.train_dataset[i] for i in range(4)]))
        found.append(selection.indices.where(selection.mask, -1))
        trainer.train()
    assert found[0].equal(found[1]) and found[0].equal(found[2])
    with pytest.raises(ValueError, match="questions .*None.*'answer_gradient' and 'attention' read the trace"):
        make_trainer(model, processor, tmp_path, selection_method="answer_occlusion")
