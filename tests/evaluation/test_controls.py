"""Controls: what each puts into which span, seen by recording what `generate` is fed."""

import pytest
import torch

from ilvr.evaluation import CONTROLS, Evaluator, Questions, controls, follow_donors, run_controls
from ilvr.evaluation.controls import ControlInputs, replace_by
from ilvr.evaluation.helper_features import followed_targets, helper_features, own_selector, selected_targets
from ilvr.tasks import Task, load_task


K, D = 2, 3


def spans(*numbers):
    """Latents (spans, K, D) of which each has one number in all places, the second of a span 0.5 more."""
    return torch.tensor([[[n] * D, [n + 0.5] * D] for n in numbers]).float().view(len(numbers), K, D)


OWN = [spans(1, 2), spans(), spans(11, 12, 13), spans(21)]


def put_in(name, batch=range(4), fed=9.0, targets=None, spans=4):
    """What a control makes of latents of `fed`: the first element of each, (rows, spans, K)."""
    inputs = ControlInputs(batch, OWN, targets, torch.full((D,), 7.0), start_id=5)
    intervene = CONTROLS[name](inputs)["latent_intervention"]
    rows, latents = len(batch), torch.full((len(batch), D), fed)
    full = [
        [intervene(latents, torch.full((rows,), s), torch.full((rows,), k))[:, 0] for k in range(K)]
        for s in range(spans)
    ]
    return torch.stack([torch.stack(span, -1) for span in full], 1).tolist()


def test_another_sample():
    first, none, third, fourth = put_in("another_sample")
    assert first == [[21, 21.5]] * 4  # the last sample's, whose only span stands in for all
    assert none == third == [[1, 1.5], [2, 2.5], [2, 2.5], [2, 2.5]]  # of the sample before that has spans
    assert fourth[:3] == [[11, 11.5], [12, 12.5], [13, 13.5]]
    assert put_in("another_sample", range(3, 4)) == [fourth]  # wherever the batch is cut


def test_position_mean():
    assert put_in("position_mean", spans=4)[0] == [[11, 11.5], [7, 7.5], [13, 13.5], [13, 13.5]]


def test_first_latent():
    first, none, third, _ = put_in("first_latent")
    assert first == [[1, 1]] * 4 and third == [[11, 11]] * 4
    assert none == [[9, 9]] * 4  # no latent of its own to repeat


def test_zeros_and_markers():
    assert put_in("zeros") == [[[0, 0]] * 4] * 4
    assert put_in("markers_only") == [[[7, 7]] * 4] * 4


def test_oracle():
    targets = [spans(31, 32), spans(41), spans(), spans(51)]
    first, second, third, _ = put_in("oracle", targets=targets)
    assert first == [[31, 31.5], [32, 32.5], [9, 9], [9, 9]] and second[:2] == [[41, 41.5], [9, 9]]
    assert third == [[9, 9]] * 4


@pytest.mark.parametrize("share, cosine", [(0.1, 0.99), (0.3, 0.92), (1.0, 0.0)])
def test_noise_keeps_the_norm(share, cosine):
    latents = torch.randn(400, 64, generator=torch.Generator().manual_seed(1)) * 3
    inputs = ControlInputs(range(400), [], None, torch.zeros(64), 5)
    intervene = CONTROLS[f"noise_{share}"](inputs)["latent_intervention"]
    zero = torch.zeros(400, dtype=torch.long)
    changed = intervene(latents, zero, zero)
    assert torch.allclose(changed.norm(dim=-1), latents.norm(dim=-1), rtol=1e-5)
    # Orthogonal parts of length 1 - s and s, as in many dimensions: cosine (1 - s) / sqrt((1 - s)^2 + s^2).
    assert torch.cosine_similarity(changed, latents).mean() == pytest.approx(cosine, abs=0.02)
    again = CONTROLS[f"noise_{share}"](inputs)["latent_intervention"](latents, zero, zero)
    assert torch.equal(changed, again)
    assert not torch.equal(changed, intervene(latents, zero, zero))  # another latent, another draw


def test_rows_outside_spans_and_beams():
    intervene = replace_by([spans(1), spans(2)])
    outside = intervene(torch.full((2, D), 9.0), torch.tensor([-1, 0]), torch.tensor([-1, 1]))
    assert outside[:, 0].tolist() == [9, 2.5]
    with pytest.raises(ValueError, match="for 2 rows, got 4"):
        intervene(torch.zeros(4, D), torch.zeros(4).long(), torch.zeros(4).long())


# ------------------------------------------------------------------------------------------------------------- a model


@pytest.fixture
def evaluator(model, processor):
    task = load_task("shifts", boards=2, test_boards=5, lengths=[2, 3])
    start_id = processor.latent_token_ids[0]
    settings = {"batch_size": 2, "max_new_tokens": 16, "sequence_bias": [[[start_id], 6.0]]}
    return Evaluator(model, processor, Questions.of_task(task), **settings)


def fed(evaluator, monkeypatch):
    """Records what the model is fed in each run, as the run's latents."""
    run = evaluator.run
    monkeypatch.setattr(evaluator, "run", lambda *a, **k: run(*a, **{**k, "keep_latents": True}))


def test_all_controls_of_a_model(evaluator, monkeypatch):
    fed(evaluator, monkeypatch)
    questions, model = evaluator.questions, evaluator.model
    features = helper_features(model, evaluator.processor, questions.dataset)
    targets = followed_targets(questions.task, questions.samples, features, latent_size=3)
    runs = run_controls(evaluator, targets=targets)
    own = runs["own"].latents
    assert list(runs) == ["own", *CONTROLS] and min(map(len, own)) > 0
    pad = model.get_input_embeddings().weight[evaluator.processor.latent_token_ids[1]]
    for i in range(len(own)):
        first = {name: run.latents[i][0] for name, run in runs.items() if name != "no_spans"}  # (K, D)
        assert torch.equal(first["another_sample"], own[i - 1][0])
        assert torch.equal(first["first_latent"], own[i][0, :1].expand(3, -1))
        assert torch.allclose(first["position_mean"], torch.stack([latents[0] for latents in own]).mean(0))
        assert torch.allclose(first["oracle"], targets[i][0]) and not first["zeros"].any()
        assert torch.equal(first["markers_only"], pad.expand(3, -1))
        assert torch.allclose(first["noise_1.0"][0].norm(), own[i][0, 0].norm(), rtol=1e-4)
        hidden = runs["hidden_image"].latents[i]
        assert torch.allclose(hidden[0], own[i][0], atol=1e-5)  # the first span sees the image
        assert len(own[i]) > 1 and not torch.allclose(hidden[1], own[i][1], atol=1e-4)
    assert all(record.spans == 0 for record in runs["no_spans"].records)


def test_latents_of_followed_patches(evaluator):
    """The feature of the patch that the task names, in each helper image."""
    questions, model, processor = evaluator.questions, evaluator.model, evaluator.processor
    features = helper_features(model, processor, questions.dataset, batch_size=2)
    targets = followed_targets(questions.task, questions.samples, features, latent_size=3)
    sample = questions.dataset[3]
    patches = questions.task.followed_patches(sample)
    from ilvr.data.images import open_image

    inputs = processor.image_processor([open_image(sample["images"][2], "x")], return_tensors="pt")
    alone = model.get_image_features(**inputs, return_dict=True).pooler_output[0]
    assert torch.allclose(targets[3][1], alone[patches[1]].expand(3, -1), atol=1e-5)
    assert [len(own) for own in targets] == [len(questions.task.followed_patches(s)) for s in questions.samples]

    class Unknown(type(questions.task)):
        title = "A task"
        followed_patches = Task.followed_patches

    with pytest.raises(ValueError, match="A task does not say which patches"):
        followed_targets(Unknown(boards=1, test_boards=1), questions.samples, features, 3)
    with pytest.raises(ValueError, match="sample 0 of Shifts has . patches and 0 helper images"):
        followed_targets(questions.task, questions.samples, [[]] * 5, 3)


@pytest.mark.parametrize("max_candidates", [256, 2])
def test_latents_of_a_selector(evaluator, max_candidates):
    """As stage 1 feeds them: the patch of each helper image that the selector picks, and pads behind it."""
    questions, model, processor = evaluator.questions, evaluator.model, evaluator.processor
    settings = {"selection_top_p": 0.01, "unselected_slots": "pad", "max_candidates": max_candidates}
    selector = own_selector(model, max_length=1, **settings)  # which leaves no question out
    pad = model.get_input_embeddings().weight[processor.latent_token_ids[1]].detach()
    targets, patches = selected_targets(selector, processor, questions.dataset, pad, batch_size=2)
    assert (patches is None) == (max_candidates == 2)
    features = helper_features(model, processor, questions.dataset)
    assert [len(own) for own in targets] == [len(own) for own in features]
    for sample, (own, pictures) in enumerate(zip(targets, features)):
        for span, (latents, picture) in enumerate(zip(own, pictures)):
            if patches is not None:
                assert patches[sample][span][1:] == [-1, -1]
                torch.testing.assert_close(latents[0], picture[patches[sample][span][0]], rtol=0, atol=1e-4)
            assert torch.equal(latents[1:], pad.expand(2, -1))


def test_donor_following(evaluator, monkeypatch):
    """The last span is a donor's with as many spans, the others are the sample's own; answers are scored both ways."""
    fed(evaluator, monkeypatch)
    questions = evaluator.questions
    own = evaluator.run()
    found = follow_donors(evaluator, own)
    assert found.donors
    for sample, donor in found.donors.items():
        assert len(own.latents[donor]) == len(own.latents[sample])
        assert questions.references[donor] != questions.references[sample]
        changed = found.run.latents[sample]
        last = len(own.latents[sample]) - 1
        assert torch.equal(changed[last], own.latents[donor][last])
        assert torch.equal(changed[:last], own.latents[sample][:last])
        answer = [found.run.answers[sample]]
        assert found.follows[sample] == questions.is_right(answer, [questions.references[donor]])[0]
    monkeypatch.setattr(questions, "is_right", lambda answers, references: [r == "x y" for r in references])
    monkeypatch.setattr(questions.task, "donor_reference", lambda sample, donor: "x y", raising=False)
    assert all(follow_donors(evaluator, own).follows.values())


def test_donors_lead_to_another_answer(evaluator):
    own = evaluator.run(keep_latents=True)
    questions = evaluator.questions
    for sample in questions.samples:
        sample["answer"] = "x y"
    questions.references = ["x y"] * len(questions)
    assert follow_donors(evaluator, own) is None


def test_no_donors(evaluator, monkeypatch):
    own = evaluator.run(keep_latents=True)
    monkeypatch.setattr(evaluator.questions, "task", load_task("frozen_lake", maps={3: 1}, test_maps={3: 1}))
    assert follow_donors(evaluator, own) is None
    monkeypatch.setattr(evaluator.questions, "task", None)
    assert follow_donors(evaluator, own) is None


def test_controls_that_cannot_be_run(evaluator):
    with pytest.raises(ValueError, match="no control 'ones'; choose among another_sample, position_mean"):
        run_controls(evaluator, ["zeros", "ones"])
    with pytest.raises(ValueError, match="Pass targets="):
        run_controls(evaluator, ["oracle"])


def test_other_targets_are_another_run(evaluator, tmp_path):
    evaluator.folder = tmp_path
    questions = evaluator.questions
    features = helper_features(evaluator.model, evaluator.processor, questions.dataset)
    targets = followed_targets(questions.task, questions.samples, features, latent_size=3)
    run_controls(evaluator, ["oracle"], targets=targets)
    with pytest.raises(ValueError, match="oracle.jsonl holds answers of another run: its targets is"):
        run_controls(evaluator, ["oracle"], targets=[own + 1 for own in targets])


def test_small_sets_are_controls():
    assert {*controls.SMALL, *controls.REPORTED} <= set(CONTROLS)
