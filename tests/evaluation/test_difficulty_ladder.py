"""A ladder over difficulty: what is drawn, when it goes up and back, and that a resumed run equals the other."""

import copy
from collections import Counter

import pytest
from helpers import make_dataset, make_sample, make_trainer

from ilvr.evaluation import DifficultyLadder, Questions, join_levels
from ilvr.trainer.inputs.sampler import LadderSampler


LEVELS = [
    make_dataset([{**make_sample(["Up"] * spans, f"Plan {spans} {i}"), "answer": "Up"} for i in range(3)])
    for spans in (1, 2, 3)
]
TRAIN, ASKED = join_levels(LEVELS), [level.select(range(2)) for level in LEVELS]


def climb(model, processor, folder, script, **settings):
    """A trainer whose ladder finds the accuracies of `script`, by step and level; 1 where it says none."""
    trainer = make_trainer(
        model, processor, folder, dataset=TRAIN, stage=2, per_device_train_batch_size=2, max_steps=9, **settings
    )
    ladder = DifficultyLadder(trainer, ASKED, every=1, patience=2)
    ladder.accuracy = lambda level: script.get((trainer.state.global_step, level), 1.0)
    trainer.add_callback(ladder)
    drawn, collate = [], trainer.data_collator.torch_call
    trainer.data_collator.torch_call = lambda rows: drawn.append([row["level"] for row in rows]) or collate(rows)
    return trainer, ladder, drawn


def levels_logged(trainer) -> list[int]:
    return [line["ladder_level"] for line in trainer.state.log_history if "ladder_level" in line]


def test_a_tenth_is_drawn_from_earlier_levels():
    levels = [2, 0, 1, 0, 1, 2, 2]
    sampler = LadderSampler(levels, rehearsal=0.1, seed=0)
    assert len(sampler) == 7 and {levels[i] for i in sampler} == {0} and sampler.drawn == 7
    sampler.move_to(2)
    assert {levels[sampler.draw(n)] for n in range(7)} == {0}  # drawn already
    rows = Counter(sampler.draw(n) for n in range(7, 4007))
    earlier = sum(count for row, count in rows.items() if levels[row] < 2)
    assert rows.keys() == set(range(7)) and earlier / 4000 == pytest.approx(0.1, abs=0.02)
    again = LadderSampler(levels, rehearsal=0.1, seed=0)
    again.history = [[0, 0], [7, 2]]
    assert [again.draw(n) for n in range(50)] == [sampler.draw(n) for n in range(50)]
    other = LadderSampler(levels, rehearsal=0.1, seed=1)
    other.history = again.history
    assert [other.draw(n) for n in range(50)] != [sampler.draw(n) for n in range(50)]
    sampler.epoch = 1
    assert list(sampler) == [sampler.draw(n) for n in range(7, 14)]


def test_up_when_a_level_is_mastered(model, processor, tmp_path):
    """Mastered twice in a row: up. A miss between starts the count anew."""
    trainer, ladder, drawn = climb(model, processor, tmp_path, {(2, 0): 0.89})
    trainer.train()
    assert levels_logged(trainer) == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert ladder.train_sampler.history == [[0, 0], [9, 1], [13, 2]]  # one batch has been fetched ahead
    assert all(level == 0 for batch in drawn[:5] for level in batch) and max(drawn[5]) == 1 and max(drawn[8]) == 2


def test_back_when_the_level_before_is_forgotten(model, processor, tmp_path):
    trainer, ladder, _ = climb(model, processor, tmp_path, {(4, 0): 0.79, (5, 0): 0.8, (6, 0): 0.5})
    trainer.train()
    assert levels_logged(trainer) == [0, 0, 1, 1, 0, 0, 0, 0, 1]
    assert model.training


def test_a_resumed_ladder_equals_an_uninterrupted_one(model, processor, tmp_path):
    """Resumed after a step that changed the level, in the second epoch: five batches an epoch."""
    script = {(step, 0): 0.5 for step in range(1, 5)}
    settings = {"save_strategy": "steps", "save_steps": 6}
    first, resumed = copy.deepcopy(model), copy.deepcopy(model)
    whole, expected, drawn = climb(model, processor, tmp_path / "a", script)
    whole.train()
    climb(first, processor, tmp_path / "b", script, **settings)[0].train()
    trainer, ladder, drawn_after = climb(resumed, processor, tmp_path / "b", script)
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-6"))
    assert ladder.train_sampler.history == expected.train_sampler.history and len(ladder.train_sampler.history) > 2
    assert levels_logged(trainer) == levels_logged(whole)
    assert drawn_after == drawn[6:]
    for (name, a), b in zip(model.named_parameters(), resumed.named_parameters()):
        assert a.equal(b[1]), name


def test_accuracy_is_of_the_levels_held_out_questions(model, processor, tmp_path, monkeypatch):
    trainer = make_trainer(model, processor, tmp_path, dataset=TRAIN, stage=2)
    tests = [Questions(level, [f"{i} {row}" for row in range(2)]) for i, level in enumerate(ASKED)]
    ladder = DifficultyLadder(trainer, tests, batch_size=1, max_new_tokens=3)
    monkeypatch.setattr(Questions, "is_right", lambda self, answers, references: [references == ["1 1"]])
    assert [ladder.accuracy(level) for level in range(3)] == [0, 0.5, 0]


def test_cached_images_keep_the_level(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, dataset=TRAIN, stage=2, cache_images=True)
    assert list(trainer.train_dataset["level"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("settings", "tests", "options", "message"),
    [
        ({"dataset": LEVELS[0]}, ASKED, {}, "a column `level`, no stream. Use `join_levels`"),
        ({}, ASKED[:2], {}, r"has the levels \[0, 1, 2\], and there are tests of 2"),
        ({}, [test.remove_columns("answer") for test in ASKED], {}, "answer: sample 0 of questions has none"),
        ({}, ASKED, {"patience": 0}, "numbers from 1 on"),
        ({}, ASKED, {"fall_back": 0.95}, "fall_back=0.95 and threshold=0.9"),
        ({"train_sampling_strategy": "group_by_length"}, ASKED, {}, "draws by level"),
        ({"restore_callback_states_from_checkpoint": True}, ASKED, {}, "reads its state itself"),
    ],
)
def test_what_cannot_climb_is_refused(model, processor, tmp_path, settings, tests, options, message):
    trainer = make_trainer(model, processor, tmp_path, **{"dataset": TRAIN, "stage": 2, **settings})
    with pytest.raises(ValueError, match=message):
        DifficultyLadder(trainer, tests, **options)
