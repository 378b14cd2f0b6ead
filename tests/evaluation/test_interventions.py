"""One span replaced: it alone, by what was meant, and what the comparison marks."""

import pytest
import torch

from ilvr.evaluation import answer_batch
from ilvr.evaluation.interventions import compare_words, noise_like, replace_span, replacements
from ilvr.evaluation.streaming import CHIP, stream_answer
from ilvr.tasks import load_task


@pytest.fixture
def ask(model, processor):
    """Answers a question of shifts, with spans."""
    dataset = load_task("shifts", boards=1, test_boards=2, lengths=[2, 3]).dataset("test")
    bias = [[[processor.latent_token_ids[0]], 6.0]]

    def ask(number=0, **settings):
        settings = {"max_new_tokens": 24, "sequence_bias": bias, **settings}
        return list(stream_answer(model, processor, dataset[number], **settings))

    return ask


def test_an_answer_grows_to_what_generate_returns(ask, model, processor):
    traces = ask()
    texts = [trace.text for trace in traces]
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:])) and len(texts) > 3
    assert all(trace.answer is None for trace in traces[:-1])
    answer = traces[-1].answer
    assert len(answer.latents) == answer.spans > 2
    assert len(CHIP.findall(texts[-1])) in (answer.spans, answer.spans + 1)  # the last may be cut off


def test_what_goes_wrong_while_it_generates_is_raised(model, processor):
    with pytest.raises(ValueError, match="1 image parts for 0 images"):
        sample = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": []}
        list(stream_answer(model, processor, sample))


def test_only_the_chosen_span_changes(ask):
    own, donor = ask()[-1], ask(1)[-1].answer.latents[0]
    assert not torch.allclose(own.answer.latents[1], donor, atol=1e-3)
    for label, latents in replacements(own.answer.latents[1], donor, "a donor's"):
        if latents is None:
            again = ask()[-1]
            assert again.text == own.text and torch.equal(again.answer.latents, own.answer.latents)
            continue
        changed = ask(latent_intervention=replace_span(1, latents))[-1]
        assert torch.equal(changed.answer.latents[0], own.answer.latents[0]), label  # the span before
        assert torch.equal(changed.answer.latents[1], latents), label
        cut = own.text.index("[latent 2]")
        assert changed.text[:cut] == own.text[:cut]  # the words before
        assert not torch.equal(changed.answer.latents[2], own.answer.latents[2]), label  # it sees what was put in
    assert torch.equal(changed.answer.latents[1], torch.zeros_like(donor))


def test_in_a_batch_as_alone(ask, model, processor):
    dataset = load_task("shifts", boards=1, test_boards=2, lengths=[2, 3]).dataset("test")
    given = torch.full((3, 32), 0.5)
    settings = {"max_new_tokens": 24, "sequence_bias": [[[processor.latent_token_ids[0]], 6.0]]}
    settings |= {"output_latents": True, "latent_intervention": replace_span(1, given)}
    for row in answer_batch(model, processor, [dataset[0], dataset[1]], **settings):
        assert torch.equal(row.latents[1], given) and not torch.equal(row.latents[0], given)


def test_noise_keeps_the_norm_of_each_latent():
    latents = torch.randn(4, 64) * torch.tensor([[1.0], [2.0], [3.0], [0.0]])
    first, second = noise_like(latents, seed=0), noise_like(latents, seed=1)
    assert torch.allclose(first.norm(dim=-1), latents.norm(dim=-1)) and not torch.equal(first, second)
    assert torch.equal(first, noise_like(latents, seed=0)) and not first[3].any()


def test_without_a_donor():
    labels = [label for label, _ in replacements(torch.ones(1, 2), None, "none")]
    assert labels == ["its own again", "noise of its norm", "noise, another draw", "zeros"]


def test_words_that_changed():
    same = compare_words("Right [latent 1] Down", "Right\n[latent 1]  Down")
    assert same == [("Right", False), ("[latent 1]", False), ("Down", False)]
    words = compare_words("1 U [latent 1] 2 D \\boxed{a}", "1 U [latent 1] 2 L [latent 2] \\boxed{b}")
    assert [word for word, changed in words if changed] == ["L", "[latent 2]", "\\boxed{b}"]
    assert compare_words("a b", "") == []
