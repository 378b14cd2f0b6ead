"""Shifts: rules, splits, what each form says, and what is refused."""

import json
import random
from itertools import product

import numpy as np
import pytest
from task_forms import check_forms, check_refusals, check_vocabulary, words_of

from ilvr.data.images import open_image
from ilvr.tasks import load_task
from ilvr.tasks.cells import cell_name
from ilvr.tasks.shifts import ShiftBoard, render_shift_board
from ilvr.tasks.shifts.board import all_shifts, sample_board, sample_shifts


BOARD = ShiftBoard(("FHG", "HFF", "GGH"), (1, 2))


@pytest.mark.parametrize(
    "shift, rows, player",
    [
        ("a L", ("HGF", "HFF", "GGH"), (1, 2)),  # another row: the player stays
        ("b R", ("FHG", "FHF", "GGH"), (1, 0)),  # round the edge
        ("b L", ("FHG", "FFH", "GGH"), (1, 1)),
        ("x D", ("GHG", "FFF", "HGH"), (1, 2)),
        ("z D", ("FHH", "HFG", "GGF"), (2, 2)),
        ("z U", ("FHF", "HFH", "GGG"), (0, 2)),
    ],
)
def test_shifts_worked_out_by_hand(shift, rows, player):
    assert BOARD.shift(shift) == ShiftBoard(rows, player)


def test_the_player_takes_the_tile_along():
    """By b R from (1, 2) to (1, 0), x U to (0, 0), a L round to (0, 2), z D back to (1, 2)."""
    cells, board = [], BOARD
    for shift in ("b R", "x U", "a L", "z D"):
        board = board.shift(shift)
        cells.append((board.player, board.rows[board.player[0]][board.player[1]]))
    assert cells == [((1, 0), "F"), ((0, 0), "F"), ((0, 2), "F"), ((1, 2), "F")]


@pytest.mark.parametrize("size", [3, 4, 5])
def test_each_shift_is_a_permutation_with_an_inverse(size):
    """No two players end in one cell, a shift and its inverse do nothing, `size` times the same does nothing."""
    inverse = dict(zip("LRUD", "RLDU"))
    rows = sample_board(random.Random(0), size, "train", 0).rows
    boards = [ShiftBoard(rows, cell) for cell in product(range(size), repeat=2)]
    assert len(all_shifts(size)) == 4 * size
    for shift in all_shifts(size):
        assert len({board.shift(shift).player for board in boards}) == size**2
        assert sorted("".join(boards[0].shift(shift).rows)) == sorted("".join(rows))
        for board in boards:
            line, direction = shift.split()
            assert board.shift(shift).shift(f"{line} {inverse[direction]}") == board
            around = board
            for _ in range(size):
                around = around.shift(shift)
            assert around == board


def test_the_order_of_shifts_matters():
    assert BOARD.shift("b R").shift("z D").player == (1, 0)
    assert BOARD.shift("z D").shift("b R").player == (2, 2)


def test_splits_are_disjoint_and_a_seed_fixes_everything():
    settings = {"boards": 40, "test_boards": 40, "base_boards": 40}
    task, other = load_task("shifts", **settings, seed=3), load_task("shifts", **settings, seed=4)
    again = load_task("shifts", **settings, seed=3)
    rows = {form: task.dataset(*form) for form in (("train", "trace"), ("train", "base"), ("test", "trace"))}
    boards = {form: {tuple(json.loads(m)["board"]) for m in data["metadata"]} for form, data in rows.items()}
    test = boards.pop(("test", "trace"))
    assert len(test) == 40 and not any(test & trained for trained in boards.values())
    assert again.dataset("test").to_dict() == rows["test", "trace"].to_dict() != other.dataset("test").to_dict()
    assert again.dataset("train", "base").to_dict() == rows["train", "base"].to_dict()


def test_touch_is_the_share_of_shifts_that_surely_move_the_player():
    def moved(touch):
        rng, board, count = random.Random(0), BOARD, 0
        for after in BOARD.after(sample_shifts(rng, BOARD, 2000, touch)):
            count += after.player != board.player
            board = after
        return count / 2000

    # A third of all shifts are of the player's row or column.
    assert moved(1) == 1 and moved(0) == pytest.approx(1 / 3, abs=0.04)
    assert moved(0.6) == pytest.approx(0.6 + 0.4 / 3, abs=0.04)


@pytest.mark.parametrize("latent_size", [1, 3])
def test_forms_say_the_same_in_their_own_way(latent_size):
    task = load_task("shifts", boards=6, test_boards=6, size=4, lengths=[2, 16], latent_size=latent_size)
    forms = check_forms(task, "test", latent_size)
    for trace, text, equal in zip(forms["trace"], forms["text"], forms["text_equal"]):
        metadata = json.loads(trace["metadata"])
        board, cells = ShiftBoard(tuple(metadata["board"]), tuple(metadata["player"])), []
        for number, shift in enumerate(metadata["shifts"], start=1):
            board = board.shift(shift)
            cells.append(cell_name(board.player))
            image = open_image(trace["images"][number], "board")
            assert np.array_equal(image, render_shift_board(board))
        numbered = [f"{number} {shift}" for number, shift in enumerate(metadata["shifts"], start=1)]
        asked = f"Where does the player end? Shifts 1 to {len(numbered)} of {' '.join(numbered)}. Think step by step."
        assert words_of(trace, "user") == asked
        # Number and shift before each helper image, and nothing of where it leads.
        end = f" \\boxed{{{cells[-1]}}}"
        assert words_of(trace, "assistant") == "".join(f" {step}" for step in numbered) + end
        assert words_of(text, "assistant") == "".join(f" {s} {cell}" for s, cell in zip(numbered, cells)) + end
        filler = " …" * latent_size  # a span of K + 2 positions, less the two words of a cell
        said = "".join(f" {s} {cell}{filler}" for s, cell in zip(numbered, cells))
        assert words_of(equal, "assistant") == said + end
        assert trace["answer"] == cells[-1]
        row, column = board.player
        assert task.followed_patches(trace)[-1] == 4 * row + column
        assert [caption for caption, _ in task.draw(trace, "")] == [f"after {s}" for s in metadata["shifts"]]
        assert np.array_equal(task.draw(trace, "")[-1][1], render_shift_board(board))
        assert task.group(trace) == f"{len(numbered)} shifts"
    assert {len(json.loads(m)["shifts"]) for m in forms["trace"]["metadata"]} <= set(range(2, 17))


def test_steps_may_be_numbers_alone():
    row = load_task("shifts", boards=1, test_boards=1, lengths=[3, 3], names_shifts=False).dataset("train")[0]
    assert words_of(row, "assistant") == f" 1 2 3 \\boxed{{{row['answer']}}}" and len(row["images"]) == 4


def test_a_question_lists_shifts_that_it_does_not_ask_for():
    task = load_task("shifts", boards=60, test_boards=3, lengths=[3, 4], listed=[1, 6], number_from=[2, 5])
    before, behind = set(), set()
    for row in task.dataset("train"):
        metadata = json.loads(row["metadata"])
        first, shifts = metadata["first_number"], metadata["shifts"]
        words = words_of(row, "user").removeprefix("Where does the player end? Shifts ").split(".")[0].split()
        assert words[:4] == [str(first), "to", str(first + len(shifts) - 1), "of"]
        numbers, listed = [int(word) for word in words[4::3]], list(zip(words[5::3], words[6::3]))
        assert numbers == list(range(numbers[0], numbers[0] + len(listed))) and 2 <= numbers[0] <= 5
        start = first - numbers[0]
        assert [" ".join(shift) for shift in listed[start : start + len(shifts)]] == shifts
        steps = [f"{number} {shift}" for number, shift in enumerate(shifts, start=first)]
        assert words_of(row, "assistant").split(" \\boxed")[0].split() == " ".join(steps).split()
        before, behind = before | {start}, behind | {len(listed) - start - len(shifts)}
    assert before == behind == {0, 1, 2, 3}
    assert " 10" in "".join(task.texts())  # the last number listed


def test_the_followed_patch_is_where_the_player_is_drawn():
    """The helper image differs from the same board with the player elsewhere in the followed patch."""
    task = load_task("shifts", boards=3, test_boards=1)
    for sample in task.dataset("train"):
        metadata = json.loads(sample["metadata"])
        for (_, picture), patch in zip(task.draw(sample, ""), task.followed_patches(sample)):
            row, column = divmod(patch, 3)
            pixels = np.asarray(picture)[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
            bare = [ShiftBoard((letter * 3,) * 3, (0, 1)) for letter in "FHG"]
            assert not any(np.array_equal(pixels, np.asarray(render_shift_board(b))[:64, :64]) for b in bare)
        assert len(metadata["followed"]) == len(metadata["shifts"])


def test_the_last_span_of_another_sample_leads_to_its_answer():
    task = load_task("shifts", boards=2, test_boards=2)
    one, other = task.dataset("test")
    assert task.donor_reference(one, other) == other["answer"] and task.reference(one) == one["answer"]


@pytest.mark.parametrize(("listed", "at_once"), [((1, 1), [1, 2, 1, 2]), ((12, 14), [1, 2])])
def test_base_asks_first_where_the_player_is(listed, at_once):
    task = load_task("shifts", boards=1, test_boards=1, base_boards=4, listed=listed)
    for sample in task.dataset("train", "base"):
        metadata = json.loads(sample["metadata"])
        board = ShiftBoard(tuple(metadata["board"]), tuple(metadata["player"]))
        turns = [message["content"][-1]["text"] for message in sample["messages"]]
        assert turns[:3] == [task.helper_question, f" \\boxed{{{cell_name(board.player)}}}", "Describe the board."]
        row, column = board.player
        letters = [line.split() for line in turns[3].split("\n")]
        assert letters[row][column] == "P" and sum(line.count("P") for line in letters) == 1
        assert len(sample["images"]) == 1
        for number in at_once:
            question, answer = turns[4:6]
            del turns[4:6]
            words = question.split(" of ")[1].split(".")[0].split()
            assert len(words) == 3 * number
            end = board
            for line, direction in zip(words[1::3], words[2::3]):
                end = end.shift(f"{line} {direction}")
            assert answer == f" \\boxed{{{cell_name(end.player)}}}"
        if listed == (1, 1):
            assert len(turns) == 4
            continue
        asked, repeated = turns[4:]
        wanted, shifts = asked.removeprefix("Repeat the shifts ").removesuffix(".").split(" of ")
        words = repeated.split()
        assert f"{words[0]} to {words[-3]}" == wanted and repeated.strip() in shifts
        assert 4 <= len(words) // 3 <= 14 and 12 <= len(shifts.split()) // 3 <= 14


def test_shifts_may_be_numbered_from_a_random_number():
    settings = {"lengths": [4, 10], "test_lengths": [12, 16], "number_from": [1, 13], "test_number_from": [1, 7]}
    task = load_task("shifts", boards=60, test_boards=30, base_boards=5, **settings)
    plain = load_task("shifts", boards=60, test_boards=30)
    first, last = set(), 0
    for sample, other in zip(task.dataset("train"), plain.dataset("train")):
        metadata = json.loads(sample["metadata"])
        words = words_of(sample, "assistant").split("\\boxed")[0].split()
        numbers = [int(word) for word in words[::3]]
        assert numbers == list(range(metadata["first_number"], metadata["first_number"] + len(metadata["shifts"])))
        assert f" of {' '.join(words)}. Think" in words_of(sample, "user")
        assert sample["answer"] == other["answer"]  # numbers change nothing else
        first, last = first | {numbers[0]}, max(last, numbers[-1])
    assert first == set(range(1, 14)) and 20 <= last <= 22
    for sample in task.dataset("test"):
        metadata = json.loads(sample["metadata"])
        assert 12 <= len(metadata["shifts"]) <= 16 and metadata["first_number"] + len(metadata["shifts"]) - 1 <= 22


def test_tests_with_numbers_that_were_not_trained_are_warned_of(caplog):
    from transformers.utils import logging

    logger = logging.get_logger("ilvr.tasks.shifts.task")
    logger.addHandler(caplog.handler)
    try:
        load_task("shifts", boards=1, test_boards=1, number_from=[1, 7], test_lengths=[12, 16])
        assert not caplog.text  # 16 at most, both
        load_task("shifts", boards=1, test_boards=1, test_lengths=[12, 16])
        assert "up to 16, training samples up to 10" in caplog.text and "now (1, 1), by 6" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_every_word_is_one_token_of_the_vocabulary():
    ranges = {"lengths": [4, 10], "test_lengths": [16, 16], "number_from": [1, 20], "test_number_from": [1, 14]}
    task = load_task("shifts", boards=12, test_boards=12, base_boards=12, size=5, latent_size=2, **ranges)
    forms = ["trace", "answer", "text", "text_equal", "pads"]
    check_vocabulary(task, [("train", "base"), *(("train", form) for form in forms), ("test", "text")])


def test_refusals():
    check_refusals(load_task("shifts", boards=1, test_boards=1))
    with pytest.raises(ValueError, match="size 2 to 5.*got size 6"):
        load_task("shifts", boards=1, test_boards=1, size=6)
    with pytest.raises(ValueError, match="touch is a share, got size 3, touch 1.2"):
        load_task("shifts", boards=1, test_boards=1, touch=1.2)
    with pytest.raises(ValueError, match=r"lengths must be a least and a greatest number.*\[5, 4\]"):
        load_task("shifts", boards=1, test_boards=1, lengths=[5, 4])
    with pytest.raises(ValueError, match=r"number_from must be.*\[0, 4\]"):
        load_task("shifts", boards=1, test_boards=1, number_from=[0, 4])
    with pytest.raises(ValueError, match="at least one latent, got latent_size 0"):
        load_task("shifts", boards=1, test_boards=1, latent_size=0)
    with pytest.raises(ValueError, match="3x3 board has no shift 'w D'"):
        BOARD.shift("w D")
