"""What the student is fed and may not see, by the options against latents that are not used."""

from types import SimpleNamespace

import pytest
import torch
from helpers import SAMPLES, make_trainer

from ilvr import hide_images_after_first_span
from ilvr.trainer.selection import Selection
from ilvr.trainer.student_inputs import StudentInputs


OFF = {"stage": 1, "own_latents": 0.0, "image_dropout": 0.0, "image_dropout_schedule": "constant"}
INPUTS = {"input_ids": torch.zeros(400, 3, dtype=torch.long)}


def selection_of(rows: int) -> Selection:
    """A span with one target of two slots, and a span that does not exist."""
    mask = torch.tensor([[True, False], [False, False]]).expand(rows, 2, 2)
    candidates = torch.ones(rows, 2, 1, 4) * mask.any(-1).view(rows, 2, 1, 1)
    targets = torch.ones(rows, 2, 2, 4) * mask.unsqueeze(-1)
    return Selection(targets, mask, torch.zeros(rows, 2, 2, dtype=torch.long), None, candidates, mask[..., :1])


def student_inputs(progress=1.0, predicted=None, rule=None, **options):
    args = SimpleNamespace(**{**OFF, **options})
    return StudentInputs(args, rule, lambda **inputs: predicted, lambda: progress)


def test_with_all_options_off_the_targets_are_fed_and_nothing_is_drawn():
    selection, state = selection_of(400), torch.get_rng_state()
    fed = student_inputs()(INPUTS, selection, training=True)
    assert fed.keys() == {"latent_values", "latent_mask"}
    assert fed["latent_values"] is selection.targets and fed["latent_mask"] is selection.mask
    assert student_inputs(stage=2)(INPUTS, selection, training=True) == {}
    assert student_inputs()(INPUTS, None, training=True) == {}
    assert torch.get_rng_state().equal(state)


def test_an_evaluation_is_as_without_options():
    options = student_inputs(own_latents=1.0, image_dropout=1.0)
    selection = selection_of(400)
    fed = options(INPUTS, selection, training=False)
    assert fed.keys() == {"latent_values", "latent_mask"} and fed["latent_values"] is selection.targets


def test_a_rule_of_the_run_holds_always_and_beside_no_other():
    def rule(columns):
        raise NotImplementedError

    always = {"attention_rule": rule}
    assert student_inputs(rule=rule, stage=2)(INPUTS, None, training=False) == always
    fed = student_inputs(rule=rule, predicted=torch.ones(400, 2, 2, 4), own_latents=1.0)
    assert fed(INPUTS, selection_of(400), training=True)["attention_rule"] is rule
    with pytest.raises(ValueError, match="image_dropout=0.5 hides images .* Leave one of them out"):
        student_inputs(rule=rule, image_dropout=0.5)


@pytest.mark.parametrize(("schedule", "progress", "share"), [("constant", 0.0, 0.5), ("linear", 0.5, 0.25)])
def test_images_are_hidden_from_a_share_of_rows(schedule, progress, share):
    torch.manual_seed(0)
    options = student_inputs(progress, stage=2, image_dropout=0.5, image_dropout_schedule=schedule)
    fed = options(INPUTS, None, training=True)
    assert fed["attention_rule"] is hide_images_after_first_span
    assert fed["attention_rule_rows"].float().mean().item() == pytest.approx(share, abs=0.07)
    assert student_inputs(0.0, image_dropout=1.0, image_dropout_schedule="linear")(INPUTS, None, training=True) == {}


def test_own_latents_are_put_into_all_slots_of_a_share_of_rows():
    torch.manual_seed(0)
    selection, predicted = selection_of(400), torch.full((400, 2, 2, 4), 7.0)
    fed = student_inputs(0.5, predicted, own_latents=0.5)(INPUTS, selection, training=True)
    own = (fed["latent_values"] == 7).all(-1)  # (B, S, K)
    rows = own[:, 0, 0]
    assert rows.float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert fed["latent_mask"][rows, 0].all() and not fed["latent_mask"][:, 1].any()
    assert fed["latent_values"][~rows].equal(selection.targets[~rows])
    assert fed["latent_mask"][~rows].equal(selection.mask[~rows])
    assert student_inputs(0.0, predicted, own_latents=1.0)(INPUTS, selection, training=True)["latent_values"] is (
        selection.targets
    )


def test_own_latents_are_what_the_student_predicts_after_the_targets(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, own_latents=1.0, image_dropout=1.0)
    trainer.student_inputs.progress = lambda: 1.0
    batch = trainer._batch_of([trainer.train_dataset[i] for i in range(4)])
    selection = trainer.select_targets(batch)
    fed = trainer.student_inputs(batch.inputs, selection, training=True)
    targets = {"latent_values": selection.targets, "latent_mask": selection.mask}
    expected = model.model(**batch.inputs, **targets).predicted_latents
    exists = selection.mask.any(-1)
    torch.testing.assert_close(fed["latent_values"][exists], expected[exists])
    assert not fed["latent_values"].requires_grad and fed["latent_mask"][exists].all()
    # The loss of a step is that of a model which sees no image after its first span.
    collated = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model.train()
    loss = trainer.compute_loss(model, collated)
    seen = model(**batch.inputs, **{k: v for k, v in fed.items() if k.startswith("latent")}).logits
    blind = model(**batch.inputs, **fed).logits
    assert not torch.allclose(seen, blind)
    labels = batch.shift_labels
    ce = torch.nn.functional.cross_entropy(blind[labels != -100], labels[labels != -100])
    log = trainer.step_logs[True].read()[0]
    assert log["ce_loss"] == pytest.approx(ce.item(), rel=1e-4)
    assert loss.item() == pytest.approx(log["ce_loss"] + log["alignment_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_dropout": 1.5}, "`image_dropout` must lie in .* got 1.5"),
        ({"image_dropout_schedule": "cosine"}, "'constant' or 'linear', got 0.0 and 'cosine'"),
        ({"own_latents": 0.5, "stage": 2}, "is for stage 1.* Got 0.5 in stage 2"),
    ],
)
def test_options_out_of_range_are_refused(model, processor, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model, processor, tmp_path, SAMPLES[:1], **options)


def test_own_latents_of_a_sharded_model_are_refused(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("ilvr.trainer.ilvr_trainer.is_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match="own_latents takes a forward more"):
        make_trainer(model, processor, tmp_path, own_latents=0.5)
