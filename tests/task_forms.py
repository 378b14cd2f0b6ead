"""What the tests of all tasks ask of the forms of a task."""

import json

import pytest
from datasets import Dataset

from ilvr.configuration_ilvr import LATENT_TOKENS
from ilvr.tasks import Task
from ilvr.tasks.forms import FILLER, FORMS
from ilvr.tasks.small_qwen import SPECIAL_TOKENS, train_tokenizer


def words_of(sample: dict, role: str) -> str:
    """All words of a role, images left out."""
    parts = [part for message in sample["messages"] if message["role"] == role for part in message["content"]]
    return "".join(part["text"] for part in parts if part["type"] == "text")


def check_forms(task: Task, split: str, latent_size: int) -> dict[str, Dataset]:
    """The forms of a split, after a look at what all tasks hold to."""
    forms = {form: task.dataset(split, form) for form in FORMS}
    rows = {form: dataset.to_list() for form, dataset in forms.items()}
    for samples in zip(*rows.values()):
        assert len({sample["answer"] for sample in samples}) == 1
        facts = [json.loads(sample["metadata"]) for sample in samples]
        _, asked = zip(*((own.pop("task", None), own.pop("helper_questions", None)) for own in facts))
        assert all(own == facts[0] for own in facts)
        assert not any(asked[1:])  # only a trace has helper images to ask about
        assert len({bytes(sample["images"][0]["bytes"]) for sample in samples}) == 1  # the same picture in question
        questions = [words_of(sample, "user").rsplit(". ", 1)[0] for sample in samples]
        assert len(set(questions)) == 1
        assert len({words_of(sample, "user") for sample in samples}) == len(FORMS)  # and each says which form is meant
        by_form = dict(zip(rows, samples))
        trace = by_form["trace"]
        spans = len(trace["images"]) - 1
        assert spans > 0 and all(len(by_form[form]["images"]) == 1 for form in FORMS if form != "trace")
        assert len(task.followed_patches(trace)) == spans  # one for each helper image
        words = {
            form: words_of(sample, "assistant").replace("\\boxed", " \\boxed").split()
            for form, sample in by_form.items()
        }
        filled = len(words["trace"]) + spans * (latent_size + 2)
        assert len(words["text_equal"]) == len(words["pads"]) == filled
        assert [word for word in words["pads"] if word != FILLER.strip()] == words["trace"]
        assert len(words["answer"]) < len(words["trace"])
    return forms


def check_refusals(task: Task) -> None:
    with pytest.raises(ValueError, match="no form 'base' of the split 'test'"):
        task.dataset("test", "base")
    with pytest.raises(ValueError, match="no form 'sound' of the split 'train'; choose trace, answer, text, text_eq"):
        task.dataset("train", "sound")
    with pytest.raises(ValueError, match="no split 'dev'; choose train or test"):
        task.dataset("dev")


def check_vocabulary(task: Task, splits_and_forms: list[tuple[str, str]]) -> None:
    """Each word is one token of the tokenizer that a small backbone gets."""
    tokenizer = train_tokenizer(task.texts(), special_tokens=[*SPECIAL_TOKENS, *LATENT_TOKENS])
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    for name, form in splits_and_forms:
        for sample in task.dataset(name, form):
            for message in sample["messages"]:
                words = words_of({"messages": [message]}, message["role"])
                cut = [(piece, token) for piece, token in zip([p for p, _ in split(words)], tokenizer.tokenize(words))]
                assert all(piece == token for piece, token in cut), next(pair for pair in cut if pair[0] != pair[1])
                assert tokenizer.decode(tokenizer(words).input_ids) == words
