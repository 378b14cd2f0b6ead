"""Glyphs: what moves do, floors, splits, what each form says, the metric, and what is refused."""

import json
import random
import re

import numpy as np
import pytest
from task_forms import check_forms, check_refusals, check_vocabulary, words_of

from ilvr.data.images import open_image
from ilvr.evaluation import load_metric, score_each
from ilvr.tasks import load_task
from ilvr.tasks.cells import all_cells, cell_name, cell_of, patch_of
from ilvr.tasks.glyphs import GlyphBoard, render_glyph_board
from ilvr.tasks.glyphs.board import KINDS, TOUCH, WEIGHTS, all_moves, parse_move, sample_board, sample_moves
from ilvr.tasks.glyphs.conversations import alphabet, spelled
from ilvr.tasks.glyphs.floors import floor_answers, measure_floors


CORNER, CROSS, BAR, BLANK = "110100000", "010111010", "000000111", "000000000"
BOARD = GlyphBoard((CORNER, CROSS, BAR, BLANK), (0, 0))  # 2x2: a x, a y / b x, b y


def after(board, *moves):
    for move in moves:
        board = board.move(move)
    return board


@pytest.mark.parametrize(
    "move, tiles, followed",
    [
        ("swap a x a y", (CROSS, CORNER, BAR, BLANK), (0, 1)),  # the tile is followed to its new place
        ("swap b x a x", (BAR, CROSS, CORNER, BLANK), (1, 0)),  # also when the other one is named
        ("swap b x b y", (CORNER, CROSS, BLANK, BAR), (0, 0)),
        ("turn a x right", ("011001000", CROSS, BAR, BLANK), (0, 0)),
        ("turn a x left", ("000100110", CROSS, BAR, BLANK), (0, 0)),
        ("turn b x right", (CORNER, CROSS, "100100100", BLANK), (0, 0)),
        ("turn b x left", (CORNER, CROSS, "001001001", BLANK), (0, 0)),
        ("flip a x sideways", ("011001000", CROSS, BAR, BLANK), (0, 0)),
        ("flip a x over", ("000100110", CROSS, BAR, BLANK), (0, 0)),
        ("flip b x over", (CORNER, CROSS, "111000000", BLANK), (0, 0)),
        ("flip b x sideways", (CORNER, CROSS, BAR, BLANK), (0, 0)),
        ("stamp a x a y", ("100011010", CROSS, BAR, BLANK), (0, 0)),  # onto a x, from a y
        ("stamp a x b x", ("110100111", CROSS, BAR, BLANK), (0, 0)),
        ("stamp a y a x", (CORNER, "100011010", BAR, BLANK), (0, 0)),
        ("stamp a y b y", (CORNER, CROSS, BAR, BLANK), (0, 0)),  # a blank stamp
        ("print a x a y", ("110111010", CROSS, BAR, BLANK), (0, 0)),
        ("print b y b x", (CORNER, CROSS, BAR, "000000111"), (0, 0)),
        ("erase a x a y", ("100000000", CROSS, BAR, BLANK), (0, 0)),
        ("erase a y a x", (CORNER, "000011010", BAR, BLANK), (0, 0)),
    ],
)
def test_moves_worked_out_by_hand(move, tiles, followed):
    assert BOARD.move(move) == GlyphBoard(tiles, followed)


def test_each_move_but_prints_and_erasures_has_an_inverse():
    inverse = {"turn left": "right", "turn right": "left"}
    board = sample_board(random.Random(0), 4, 3, "train", 0)
    for move in all_moves(4):
        kind, cell, argument = parse_move(move)
        back = f"{kind} {cell_name(cell)} {inverse.get(f'{kind} {argument}', argument)}"
        if kind in ("print", "erase"):  # once is as good as twice
            assert after(board, move, back) == after(board, move)
        else:
            assert after(board, move, back) == board
    assert len(all_moves(4)) == 16 * 4 + 4 * 48  # 4 turns and flips a tile; moves of 24 pairs, both ways


def test_each_floor_lacks_one_part_of_the_work():
    def answers(*moves):
        found = floor_answers(BOARD, list(moves))
        end = after(BOARD, *moves)
        return {name for name, pattern in found.items() if pattern == end[end.followed]}

    everything = {"first_pattern", "order_free", "without_stamps", "last_two", "stamps_of_places", "stamps_of_tiles"}
    assert answers("stamp b y b x", "swap a x a y") == everything  # nothing happens to the tile
    assert answers("turn a x left") == everything - {"first_pattern"}
    # The turn turns the cross as well as the corner, or only the corner: a cross looks the same.
    assert answers("stamp a x a y", "turn a x left") == {
        "order_free",
        "last_two",
        "stamps_of_places",
        "stamps_of_tiles",
    }
    assert answers("stamp a x b x", "turn a x left") == {"last_two", "stamps_of_places", "stamps_of_tiles"}
    # The corner, erased by the bar and then stamped with it, has all of the bar; two moves of three are too few.
    assert answers("turn a x left", "erase a x b x", "stamp a x b x") == {"stamps_of_places", "stamps_of_tiles"}
    # The stamp's tile came from elsewhere: one floor looks at the place, the other at the tile.
    assert answers("swap a y b y", "stamp a x a y") == {"first_pattern", "without_stamps", "stamps_of_tiles"}
    # The stamp's tile was changed before: no floor sees it.
    assert answers("turn b x left", "stamp a x b x") == set()
    assert floor_answers(BOARD, ["turn b x left", "stamp a x b x"])["stamps_of_tiles"] == "110100111"


def test_floors_are_low_at_six_moves():
    """A quarter of the published episodes; the interval is as much wider."""
    floors = measure_floors(6, episodes=1000)
    assert max(whole for whole, _ in floors.values()) < 0.6
    assert all(whole <= dots < 0.9 for whole, dots in floors.values())
    without_preparation = measure_floors(6, episodes=300, weights={"stamp": 1.0}, touch=1.0)
    assert without_preparation["stamps_of_tiles"] == pytest.approx((1, 1))  # nothing else is ever changed


def test_moves_are_drawn_as_weights_and_touch_say():
    rng = random.Random(0)
    board = sample_board(rng, 4, 3, "train", 0)
    kinds, touched, steps = {}, 0, sample_moves(rng, board, 3000, weights=WEIGHTS, touch=TOUCH)
    for move, next_board in steps:
        kind, cell, _ = parse_move(move)
        kinds[kind] = kinds.get(kind, 0) + 1
        near = [board.followed, *board.neighbours(board.followed)]
        assert cell in near
        touched += cell == board.followed
        board = next_board
    assert touched / 3000 == pytest.approx(TOUCH, abs=0.04)
    assert {kind: count / 3000 for kind, count in kinds.items()} == pytest.approx(WEIGHTS, abs=0.03)
    no_stamps = sample_moves(rng, board, 50, weights={"turn": 1, "flip": 1}, touch=1)
    assert {parse_move(move)[0] for move, _ in no_stamps} == {"turn", "flip"}


def test_stamps_come_from_changed_tiles_where_there_are_any():
    rng = random.Random(1)
    for _ in range(100):
        board = sample_board(rng, 3, 3, "train", 0)
        (first, turned), (stamp, _) = sample_moves(
            rng, board, 2, weights={"stamp": 1, "print": 1, "erase": 1}, touch=0.5
        )
        _, changed, _ = parse_move(first)
        _, cell, argument = parse_move(stamp)
        if changed in turned.neighbours(cell) and turned != board:
            assert argument == cell_name(changed)


def test_splits_are_disjoint_and_a_seed_fixes_everything():
    settings = {"boards": 12, "test_boards": 12, "base_boards": 12}
    task, other = load_task("glyphs", **settings, seed=3), load_task("glyphs", **settings, seed=4)
    test, rows = task.dataset("test"), [task.dataset("train"), task.dataset("train", "base")]
    boards = [[GlyphBoard(tuple(json.loads(m)["tiles"]), (0, 0)) for m in d["metadata"]] for d in [*rows, test]]
    splits = [{board.split(3) for board in own} for own in boards]
    assert splits == [{"train"}, {"train"}, {"test"}]
    assert load_task("glyphs", **settings, seed=3).dataset("test").to_dict() == test.to_dict()
    assert test.to_dict() != other.dataset("test").to_dict()


@pytest.mark.parametrize("latent_size, words_told", [(1, 3), (2, 4), (4, 6)])
def test_forms_say_the_same_in_their_own_way(latent_size, words_told):
    task = load_task("glyphs", boards=5, test_boards=5, lengths=[2, 8], latent_size=latent_size)
    forms = check_forms(task, "test", latent_size)
    for trace, text, equal in zip(forms["trace"], forms["text"], forms["text_equal"]):
        metadata = json.loads(trace["metadata"])
        row, column = metadata["tile"].split()
        board, said = GlyphBoard(tuple(metadata["tiles"]), ("abcd".index(row), "xyzw".index(column))), []
        numbered = [f"{number} {move}" for number, move in enumerate(metadata["moves"], start=1)]
        for number, move in enumerate(metadata["moves"], start=1):
            board = board.move(move)
            said.append((cell_name(board.followed), board[board.followed]))
            assert np.array_equal(open_image(trace["images"][number], "board"), render_glyph_board(board))
        question = f"Follow the tile at {row} {column}. What is on it at the end? Moves: {' '.join(numbered)}. "
        assert words_of(trace, "user") == f"{question}Think step by step."
        end = f" \\boxed{{ {' '.join(said[-1][1])}}}"
        assert trace["answer"] == " ".join(said[-1][1])
        # Number and move before each helper image, and nothing of where it leads.
        assert words_of(trace, "assistant") == "".join(f" {step}" for step in numbered) + end
        told = "".join(f" {step} {cell} {' '.join(bits)}" for step, (cell, bits) in zip(numbered, said))
        assert words_of(text, "assistant") == told + end
        short_bits = -(-9 // (latent_size + 2))
        brief = [f"{spelled(bits, short_bits)} {cell}".split()[:words_told] for cell, bits in said]
        filler = " …" * (latent_size + 2 - words_told)
        told = "".join(f" {step} {' '.join(words)}{filler}" for step, words in zip(numbered, brief))
        assert words_of(equal, "assistant") == told + end
        # Each helper image is asked about at the place of the tile, not told what is there.
        assert metadata["helper_questions"] == [f"What is on {cell}?" for cell, _ in said]
        assert [all_cells(4)[patch] for patch in task.followed_patches(trace)][-1] == board.followed
        assert [caption for caption, _ in task.draw(trace, "")] == [f"after {m}" for m in metadata["moves"]]
        assert np.array_equal(task.draw(trace, "")[-1][1], render_glyph_board(board))
        assert task.group(trace) == f"{len(numbered)} moves"


def test_a_word_says_one_bit_or_several():
    assert spelled("000001010", 3) == "A B C" and spelled("111110100", 3) == "H G E"
    assert spelled("000001010", 1) == "0 0 0 0 0 1 0 1 0" and spelled("000001010", 4) == "A F A"  # one bit is left
    assert len(set(alphabet(9))) == 512


def test_a_step_may_tell_of_the_tile_that_it_moved():
    task = load_task("glyphs", boards=1, test_boards=30, state_of="moved", weights={"swap": 1, "turn": 1}, touch=0.5)
    tells = set()
    for trace, text in zip(task.dataset("test"), task.dataset("test", "text")):
        metadata = json.loads(trace["metadata"])
        words, patches = words_of(text, "assistant").split("\\boxed")[0].split(), task.followed_patches(trace)
        for number, (move, (_, picture)) in enumerate(zip(metadata["moves"], task.draw(trace, ""))):
            kind, cell, argument = parse_move(move)
            # A swapped tile is where the other one was.
            cell = cell_of(argument) if kind == "swap" else cell
            told, words = words[1 + len(move.split()) :][:11], words[1 + len(move.split()) + 11 :]  # place, nine bits
            assert told[:2] == cell_name(cell).split() and patches[number] == 4 * cell[0] + cell[1]
            row, column = cell
            pixels = np.asarray(picture)[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
            assert np.array_equal(pixels, np.asarray(render_glyph_board(GlyphBoard(("".join(told[2:]),), (0, 0)))))
        # The last span leads to the answer if it is about the tile that is followed.
        expected = trace["answer"] if metadata["tells_answer"] else None
        assert task.donor_reference(trace, trace) == expected
        tells.add(metadata["tells_answer"])
    assert tells == {True, False}


@pytest.mark.parametrize("state_of", ["followed", "moved"])
def test_a_step_0_comes_before_what_is_told_anyway(state_of):
    """It tells the followed tile as it is in the picture, and changes nothing else."""
    given = {"boards": 1, "test_boards": 10, "lengths": [1, 3], "latent_size": 2, "state_of": state_of, "touch": 0.5}
    without, with_first = load_task("glyphs", **given), load_task("glyphs", **given, tell_first=True)
    for form in ("trace", "text", "text_equal", "pads"):
        for plain, sample in zip(without.dataset("test", form), with_first.dataset("test", form), strict=True):
            before, after = (json.loads(row["metadata"]) for row in (plain, sample))
            tile, board = after["tile"], GlyphBoard(tuple(after["tiles"]), cell_of(after["tile"]))
            pattern = board[board.followed]
            state = {"text": f" {tile} {' '.join(pattern)}", "trace": "", "pads": " …" * 4}
            state["text_equal"] = f" {spelled(pattern, 3)} {tile[0]}"  # four words
            assert words_of(sample, "assistant") == f" 0 {tile}{state[form]}" + words_of(plain, "assistant")
            assert words_of(sample, "user") == words_of(plain, "user") and sample["answer"] == plain["answer"]
            assert with_first.group(sample) == without.group(plain)
            own = ["followed"]
            if form == "trace":
                own += ["helper_questions"]
                first, *others = sample["images"][1:]
                assert np.array_equal(open_image(first, "board"), render_glyph_board(board))
                assert others == plain["images"][1:]
                assert after["helper_questions"][0] == f"What is on {tile}?"
            assert after["followed"][0] == patch_of(board.followed, 4)
            assert {**after, **{name: after[name][1:] for name in own}} == before
            (caption, picture), *others = with_first.draw(sample, "")
            assert caption == "at first" and np.array_equal(picture, render_glyph_board(board))
            assert [name for name, _ in others] == [name for name, _ in without.draw(plain, "")]


def test_with_a_step_0_a_question_may_have_no_moves():
    settings = {"size": 1, "weights": {"turn": 1}, "touch": 1, "lengths": [0, 0], "tell_first": True}
    task = load_task("glyphs", boards=1, test_boards=2, **settings)
    forms = check_forms(task, "test", 1)
    one, other = forms["trace"]
    for sample in (one, other):
        pattern = " ".join(json.loads(sample["metadata"])["tiles"][0])
        assert words_of(sample, "assistant") == f" 0 a x \\boxed{{ {pattern}}}" and sample["answer"] == pattern
        assert task.group(sample) == "0 moves" and task.followed_patches(sample) == [0]
    assert task.donor_reference(one, other) == other["answer"] != one["answer"]


def test_the_last_span_of_another_sample_leads_to_its_answer():
    task = load_task("glyphs", boards=2, test_boards=2)
    one, other = task.dataset("test")
    assert task.donor_reference(one, other) == other["answer"] and task.reference(one) == one["answer"]


def test_base_asks_first_what_is_on_a_tile():
    task = load_task("glyphs", boards=1, test_boards=1, base_boards=4)
    for sample in task.dataset("train", "base"):
        metadata = json.loads(sample["metadata"])
        row, column = metadata["tile"].split()
        board = GlyphBoard(tuple(metadata["tiles"]), ("abcd".index(row), "xyzw".index(column)))
        turns = [message["content"][-1]["text"] for message in sample["messages"]]
        assert len(sample["images"]) == 1 and len(turns) == 14 and len(set(turns[:8:2])) == 4
        for question, answer in zip(turns[::2], turns[1::2]):
            if question.startswith("What"):
                name, end = question.removeprefix("What is on ").removesuffix("?"), board
                cell = next(cell for cell in all_cells(4) if cell_name(cell) == name)
            else:
                listed = question.split("Moves: ")[1].split(".")[0]
                end = after(board, *(move.strip() for move in re.split(r"\d+", listed) if move))
                cell = end.followed
            assert answer == f" \\boxed{{ {' '.join(end[cell])}}}"


def test_every_pattern_has_a_picture_of_its_own():
    patterns = [f"{number:09b}" for number in range(512)]
    pictures = {np.asarray(render_glyph_board(GlyphBoard((pattern,), (0, 0)))).tobytes() for pattern in patterns}
    assert len(pictures) == 512
    pixels = np.asarray(render_glyph_board(GlyphBoard(("000000001", *[BLANK] * 3), (0, 0))))
    assert pixels.shape == (128, 128, 3)
    dark = np.argwhere(pixels.sum(-1) < 200)
    assert dark.mean(0) == pytest.approx([53, 53], abs=1)  # the last bit: bottom right of the first tile


def test_metric():
    metric = load_metric("glyphs")
    right = "0 1 1 0 0 0 1 0 1"
    answers = [
        f"1 swap \\boxed{{{right}}}",
        "\\boxed{0 1 1 0 0 0 1 1 0}",  # seven of nine
        "\\boxed{0 1 1}",
        "\\boxed{0 1 1 0 0 0 1 0 x}",
        right,
    ]
    result = metric.compute(predictions=answers, references=[right] * 5)
    assert result["accuracy"] == 0.2 and result["word_accuracy"] == pytest.approx((1 + 7 / 9 + 8 / 9) / 5)
    assert result["invalid"] == 0.4 and result["count"] == 5 and result["accuracy_low"] < 0.2 < result["accuracy_high"]
    assert score_each(metric, answers, [right] * 5) == [True, False, False, False, False]


def test_every_word_is_one_token_of_the_vocabulary():
    settings = {"size": 5, "test_lengths": [16, 16], "latent_size": 3, "weights": dict.fromkeys(KINDS, 1)}
    task = load_task("glyphs", boards=8, test_boards=4, base_boards=8, **settings)
    forms = ["trace", "answer", "text", "text_equal", "pads"]
    check_vocabulary(task, [("train", "base"), *(("train", form) for form in forms), ("test", "text")])


def test_refusals():
    check_refusals(load_task("glyphs", boards=1, test_boards=1))
    for settings, message in [
        ({"size": 6}, "size 1 to 5.*got size 6, side 3"),
        ({"side": 1}, "side 2 to 5.*got size 4, side 1"),
        ({"touch": -0.1}, "touch is a share, got size 4, side 3, touch -0.1"),
        ({"size": 1, "touch": 1}, "one tile has no neighbours.*got {'swap': 0.15"),
        ({"size": 1, "touch": 1, "weights": {"print": 1}}, "keep to turn and flip in weights.*got {'print': 1}"),
        ({"size": 1, "weights": {"turn": 1}}, "one tile has no neighbours.*and 0.6"),
        ({"lengths": [5, 4]}, r"lengths must be a fewest and a most.*\[5, 4\]"),
        ({"lengths": [0, 4]}, r"from 1 on, got \[0, 4\]"),
        ({"lengths": [-1, 4], "tell_first": True}, r"from 0 on, got \[-1, 4\]"),
        (
            {"weights": {"jump": 1}},
            "weights must name some of swap, turn, flip, stamp, print, erase, not all 0, got {'jump': 1}",
        ),
        ({"weights": {"swap": 0}}, "weights must name some of"),
        ({"weights": {"swap": 1, "turn": -1}}, "weights must name some of"),
        ({"weights": {}}, "weights must name some of"),
        ({"state_of": "all"}, "state_of must be 'followed' or 'moved', got 'all'"),
        ({"latent_size": 0}, "at least one latent"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_task("glyphs", boards=1, test_boards=1, **settings)
    for move in ("swap a x left", "turn a x up", "stamp c x b x", "print a x b y"):
        with pytest.raises(ValueError, match=f"2x2 board has no move '{move}'"):
            BOARD.move(move)
