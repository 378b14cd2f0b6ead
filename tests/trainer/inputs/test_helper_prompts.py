"""What a teacher is asked of each helper image."""

import pytest
from helpers import ask_about, make_dataset, make_image, make_sample

from ilvr.trainer.inputs.columns import HELPER_ANSWERS, HELPER_PROMPTS
from ilvr.trainer.inputs.data_preparation import prepare_dataset
from ilvr.trainer.inputs.helper_prompts import add_helper_prompts


BACKBONES = ("qwen2_5_vl", "qwen3_vl", "smolvlm")
SAMPLE = make_sample(["Right", "Down", "Up Left"])  # two helper images


def test_prompts_of_helper_images_are_those_of_the_processor(processor):
    rows = prepare_dataset(make_dataset([SAMPLE]), processor, stage=1)
    asked = add_helper_prompts(rows, processor, question="Where is the goal?")
    expected = ask_about(processor, SAMPLE["images"][1], "Where is the goal?")["input_ids"][0].tolist()
    assert asked[HELPER_PROMPTS][0] == [expected, expected]


def test_each_helper_image_needs_a_question_or_words_behind_it(processor):
    rows = prepare_dataset(make_dataset([SAMPLE, make_sample(["Up"])]), processor, stage=1)
    asked = add_helper_prompts(rows, processor, question="Where?")
    assert [len(row) for row in asked[HELPER_PROMPTS]] == [2, 0] and asked[HELPER_ANSWERS][:] == [[[], []], []]
    few = rows.add_column("metadata", ['{"helper_questions": ["Where?"]}', "{}"])
    with pytest.raises(ValueError, match=r"Sample 0 .* 2 helper images and the questions \['Where\?'\]"):
        add_helper_prompts(few, processor, question="Where?")
    silent = make_dataset([make_sample(["Up"]), make_sample(["Right", "Down", ""])])
    with pytest.raises(ValueError, match="Sample 1 .*: nothing is said after helper image 1.* Set helper_question"):
        add_helper_prompts(prepare_dataset(silent, processor, stage=1), processor, question=None)


def turn(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if p else {"type": "image"} for p in parts]}


def test_the_trace_asks_where_nobody_names_a_question(model, processor):
    """The picture opens the user's turn, alone; words of the turn before it belong to the question, those behind it
    are the answer. The last helper image is asked about in the second turn; a turn behind its answer says nothing."""
    turns = [turn("user", "Plan", None), turn("assistant", "Right", None, "Down", None, "Up")]
    turns += [turn("user", "Left", None), turn("assistant", "Up", None, "Down"), turn("user", "Up")]
    sizes = [32, 64, 32, 32, 64]
    rows = make_dataset([{"messages": turns, "images": [make_image("red", size) for size in sizes]}])
    (row,) = add_helper_prompts(prepare_dataset(rows, processor, stage=1), processor, question=None)
    prompts, tokenizer = row[HELPER_PROMPTS], processor.tokenizer
    said = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in row[HELPER_ANSWERS]]
    assert said == ["DownUp", "Up", "Down"]
    plan = [ask_about(processor, make_image("red", size), "Plan")["input_ids"][0].tolist() for size in (64, 32)]
    for ids, asked, words in zip(prompts, plan, ("Right", "RightDown")):
        assert ids[: len(asked)] == asked and tokenizer.decode(ids[len(asked) :]).strip() == words
    last = tokenizer.decode(prompts[2], skip_special_tokens=True)
    assert last.index("Plan") < last.index("RightDownUp") < last.index("Left") < last.rindex("Up")
    pictures = [ids.count(model.config.image_token_id) for ids in (*prompts, *plan)]
    assert pictures[0] == pictures[2] == pictures[3] and pictures[1] == pictures[4] > 0
    assert not set(processor.latent_token_ids) & {token for ids in prompts for token in ids}


def test_an_answer_ends_with_the_assistants_own_tokens(processor):
    """Not with what a chat template writes behind a turn, which nothing trains the model to say."""
    rows = prepare_dataset(make_dataset([SAMPLE]), processor, stage=1)
    (row,) = add_helper_prompts(rows, processor, question=None)
    own = [token for token, said in zip(row["input_ids"], row["assistant_mask"]) if said]
    assert all(answer[-2:] == own[-2:] for answer in row[HELPER_ANSWERS])


def test_what_the_trace_cannot_ask(processor):
    words = {"prompt": [turn("user", "Plan")], "completion": [turn("assistant", None, "Up")]}
    rows = prepare_dataset(make_dataset([{**words, "images": [make_image("red")]}]), processor, stage=1)
    asked = add_helper_prompts(rows, processor, question=None)[0]
    assert processor.tokenizer.decode(asked[HELPER_ANSWERS][0], skip_special_tokens=True).strip() == "Up"
    with pytest.raises(ValueError, match="Sample 0 .* no messages left that could ask. Set helper_question, or keep"):
        add_helper_prompts(rows.remove_columns(["prompt", "completion"]), processor, question=None)
    alone = make_dataset([{"messages": [turn("assistant", None, "Up")], "images": [make_image("red")]}])
    with pytest.raises(ValueError, match="Sample 0 .*: messages: no user's turn comes before a helper image"):
        add_helper_prompts(prepare_dataset(alone, processor, stage=1), processor, question=None)
