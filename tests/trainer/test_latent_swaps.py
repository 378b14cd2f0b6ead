"""Interchange training: who is given whose last span, what follows it, and that the gradient reaches the donor."""

import json
import re

import pytest
import torch
from helpers import make_sample, make_trainer
from torch.nn.functional import cross_entropy

from ilvr.tasks import load_task
from ilvr.trainer import ILVRTrainingConfig
from ilvr.trainer.latent_swaps import draw_donors, swap_last_spans


ANSWERS = ["Left", "Down", "Left", "Up", "Down", "Right", "Left"]  # of 3, 3, 3, 2, 3, 1 and 3 tokens
SPANS = [2, 2, 1, 2, 1, 0, 1]


def told(tells=(True,) * 7) -> list[dict]:
    """Samples of two, one or no spans that end in one word; `tells` says whether their last span tells it."""
    samples = [make_sample([*["Up"] * spans, word], f"Plan {word}") for spans, word in zip(SPANS, ANSWERS)]
    return [{**sample, "metadata": json.dumps({"tells_answer": own})} for sample, own in zip(samples, tells)]


def start(model, processor, folder, samples=None, **settings):
    settings = {"stage": 2, "swap_latents": 0.5, "per_device_train_batch_size": 7, **settings}
    trainer = make_trainer(model, processor, folder, told() if samples is None else samples, **settings)
    return trainer, trainer._batch_of(list(trainer.train_dataset))


def test_donors_keep_their_latents_and_are_like_those_they_give_to(model, processor, tmp_path):
    start_id = model.config.latent_start_token_id
    _, batch = start(model, processor, tmp_path, told((*[True] * 6, False)))
    torch.manual_seed(0)
    seen, swapped = set(), []
    for _ in range(300):
        donors = draw_donors(batch, 0.5, start_id).tolist()
        pairs = {(row, donor) for row, donor in enumerate(donors) if row != donor}
        assert all(donors[donor] == donor for _, donor in pairs)
        seen |= pairs
        swapped.append(len(pairs) / 4)
    assert seen == {(0, 1), (1, 0), (2, 4), (4, 2)}  # row 3 says less, 5 has no span, 6 does not tell
    assert sum(swapped) / 300 == pytest.approx(0.25, abs=0.03)  # one is drawn and the other is not
    assert draw_donors(batch, 0.0, start_id).tolist() == list(range(7))


def test_a_row_goes_on_as_its_donor_does(model, processor, tmp_path):
    start_id = model.config.latent_start_token_id
    _, batch = start(model, processor, tmp_path)
    before = {name: value.clone() for name, value in batch.inputs.items() if torch.is_tensor(value)}
    swapped, _ = swap_last_spans(batch, torch.tensor([3, 1, 4, 3, 4, 5, 6]), start_id)
    texts = processor.tokenizer.batch_decode(swapped.inputs["input_ids"])
    questions = [re.search(r"Plan (\w+)", text)[1] for text in texts]
    answers = [re.search(r"(\w+)<\|im_end\|>\s*(<\|endoftext\|>)*$", text)[1] for text in texts]
    assert questions == ANSWERS
    assert answers == ["Up", "Down", "Down", "Up", "Down", "Right", "Left"]
    labels = [processor.tokenizer.decode(row[row != -100]) for row in swapped.shift_labels]
    assert all(label.startswith(("Up", "Right")) and answer in label for label, answer in zip(labels, answers))
    assert all(batch.inputs[name].equal(value) for name, value in before.items())  # not mutated


def test_a_row_is_fed_its_donors_latents_through_which_the_gradient_flows(model, processor, tmp_path):
    """As if the donor's latents had been put in; before the last span, and in all other rows, nothing changes."""
    start_id = model.config.latent_start_token_id
    _, batch = start(model, processor, tmp_path)
    donors = torch.tensor([3, 1, 4, 3, 4, 5, 6])
    batch, intervene = swap_last_spans(batch, donors, start_id)
    steps = []

    def keep(latents, span, index):
        latents.retain_grad()
        steps.append((latents, span.tolist(), index.tolist()))
        return intervene(latents, span, index)

    outputs = model(**batch.inputs, latent_intervention=keep)
    own = model(**batch.inputs).latent_inputs.detach()  # (B, S, K, D)
    expected = own.clone()
    expected[0, 1], expected[2, 0] = own[3, 1], own[4, 0]
    exists = own.any(-1)
    torch.testing.assert_close(outputs.latent_inputs[exists], expected[exists], rtol=1e-4, atol=1e-5)
    forced = model(**batch.inputs, latent_values=expected, latent_mask=exists)
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[real], forced.logits[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.predicted_latents, forced.predicted_latents, rtol=1e-4, atol=1e-4)
    assert not outputs.predicted_latents[0, 1].allclose(outputs.latent_inputs[0, 1])

    cross_entropy(outputs.logits[0], batch.shift_labels[0]).backward()
    latents = next(latents for latents, span, index in steps if (span[0], index[0]) == (1, 0))
    assert latents.grad[3].abs().max() > 0 and latents.grad[[0, 1, 2, 4, 5, 6]].abs().max() == 0


def test_training_swaps_logs_how_many_and_leaves_evaluation_alone(model, processor, tmp_path):
    trainer, batch = start(model, processor, tmp_path, max_steps=3)
    trainer.train()
    shares = [line["swapped_share"] for line in trainer.state.log_history if "swapped_share" in line]
    assert len(shares) == 3 and 0 < sum(shares) < 3
    expected = model(**batch.inputs).logits
    columns = (batch.shift_labels != -100).any(0)
    loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    labels = batch.shift_labels[:, columns]
    assert loss == pytest.approx(cross_entropy(expected[:, columns].flatten(0, 1), labels.flatten()).item(), rel=1e-4)
    assert not any("swapped" in key for key in trainer.state.log_history[-1])
    assert trainer.model_card().training["swapped latents"] == 0.5


def test_cached_images_keep_what_tells(model, processor, tmp_path):
    trainer, _ = start(model, processor, tmp_path, cache_images=True, max_steps=1)
    assert list(trainer.train_dataset["tells_answer"]) == [True] * 7
    trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swap_latents": 1.0}, r"lie in \[0, 1\), got 1.0: some rows have to be donors"),
        ({"stage": 1}, "stage=1.: stage 1 feeds targets"),
        ({"jacobi_iterations": 2}, "does not go with `jacobi_iterations`"),
        ({"fixed_point_tolerance": 0.0}, "does not go with `fixed_point_tolerance`"),
        ({"alignment_weight": 0.1}, "does not go with `alignment_weight`"),
        ({"per_device_train_batch_size": 1}, "a batch of 1, which has no other row"),
    ],
)
def test_what_cannot_swap_is_refused_by_name(settings, message, tmp_path):
    settings = {"stage": 2, "swap_latents": 0.5, "per_device_train_batch_size": 2, "bf16": False, **settings}
    with pytest.raises(ValueError, match=message):
        ILVRTrainingConfig(str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize("samples", [told((False,) * 7), [make_sample(["Up", "Down"])]])
def test_data_that_does_not_say_what_follows_is_refused(model, processor, tmp_path, samples):
    with pytest.raises(ValueError, match="No sample of the train data says .* its last span tells the answer"):
        start(model, processor, tmp_path, samples)


def test_an_intervention_is_for_latents_one_after_the_other(model, processor, tmp_path):
    _, batch = start(model, processor, tmp_path)
    values = {"latent_values": torch.zeros(7, 2, 3, 32)}
    for other in ({"jacobi_iterations": 1}, {"fixed_point_tolerance": 0.1}, values):
        with pytest.raises(ValueError, match="one after the other, .* Leave all but one out"):
            model(**batch.inputs, latent_intervention=lambda latents, span, index: latents, **other)


@pytest.mark.parametrize("name", ["shifts", "glyphs"])
def test_tasks_say_it_where_the_donors_answer_follows(name):
    task = load_task(name, boards=12, test_boards=1)
    rows = list(task.dataset("train").remove_columns("images"))
    tells = [row for row in rows if json.loads(row["metadata"])["tells_answer"]]
    assert len(tells) > 3
    for row in tells:
        for donor in tells:
            assert task.donor_reference(row, donor) == donor["answer"]
