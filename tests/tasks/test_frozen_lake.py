"""FrozenLake: pixels, rules, splits, conversations."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image
from task_forms import check_forms, check_refusals, check_vocabulary, words_of

from ilvr.data import load_conversations
from ilvr.data.images import open_image
from ilvr.tasks import Task, load_task
from ilvr.tasks.cells import all_cells, cell_name
from ilvr.tasks.frozen_lake import FrozenLake, FrozenLakeMap, board_of, frozen_lake_dataset, render_board
from ilvr.tasks.frozen_lake.board import MOVES, sample_map, sample_maps
from ilvr.tasks.frozen_lake.conversations import PROMPTS, conversation
from ilvr.tasks.frozen_lake.rendering import render_with_gymnasium


VSP_EXAMPLES = Path(__file__).parents[3] / "shared" / "data" / "vsp_examples"


@pytest.mark.parametrize("size", range(3, 9))
def test_boards_equal_gymnasiums(size):
    rng = random.Random(size)
    for board in sample_maps(3, size=size, split="train", seed=0, max_hole_fraction=0.4):
        plan = board.shortest_path(rng) + "".join(rng.choices("UDLR", k=6))
        assert np.array_equal(render_board(board), render_with_gymnasium(board))
        for cell, move in zip(board.walk(plan)[1:], plan):
            assert np.array_equal(render_board(board, cell, move), render_with_gymnasium(board, cell, move))


def test_gymnasium_walks_as_we_do():
    gymnasium = pytest.importorskip("gymnasium")
    rng = random.Random(0)
    actions = {"L": 0, "D": 1, "R": 2, "U": 3}
    for _ in range(20):
        board = sample_map(rng, 5, 0.4)
        env = gymnasium.make("FrozenLake-v1", desc=list(board.rows), is_slippery=False).unwrapped
        env.reset()
        env.s = board.start[0] * 5 + board.start[1]
        for move in rng.choices("UDLR", k=12):
            before = divmod(int(env.s), 5)
            if board[before] in "HG":
                break
            env.step(actions[move])
            assert divmod(int(env.s), 5) == board.step(before, move)


def cell_pixels(pixels: np.ndarray, row: int, column: int) -> bytes:
    return pixels[64 * row : 64 * row + 64, 64 * column : 64 * column + 64].tobytes()


@pytest.mark.skipif(not VSP_EXAMPLES.exists(), reason="the VSP examples are not part of the repository")
def test_vsp_examples_have_our_pixels():
    """Each board is read off the cells of its first picture; then every later picture is drawn from map and plan, and
    the plan leads where the example says."""
    legend = FrozenLakeMap(("SFG", "HFF", "FFF"))
    drawn = np.asarray(render_board(legend, (2, 2)))
    kinds = {cell_pixels(drawn, r, c): legend[r, c] for r in range(3) for c in range(3) if (r, c) != (2, 2)}
    count = 0
    for line in (VSP_EXAMPLES / "sample.jsonl").read_text().splitlines():
        sample = json.loads(line)
        path = VSP_EXAMPLES / sample["image_input"].removeprefix("./data/examples/")
        pixels = np.asarray(Image.open(path).convert("RGB"))
        size = len(pixels) // 64
        # The one cell that is none of these has the player on it: the start.
        letters = [[kinds.get(cell_pixels(pixels, r, c), "S") for c in range(size)] for r in range(size)]
        board = FrozenLakeMap(tuple(map("".join, letters)))
        plan = "".join(word.strip()[0] for word in re.search(r"Plan: (.*)", sample["text_input"])[1].split(","))
        assert np.array_equal(pixels, render_board(board))
        outcome = {"G": "A", "H": "B"}.get(board[board.walk(plan)[-1]], "C")
        assert sample["text_output"].endswith(f"\\boxed{{{outcome}}}.")
        for step, position in enumerate(board.walk(plan)[1:], 1):
            later = path.with_name(path.name.replace("step_0", f"step_{step}"))
            if later.exists():
                assert np.array_equal(Image.open(later).convert("RGB"), render_board(board, position, plan[step - 1]))
                count += 1
    assert count == 40


def test_maps_have_paths_and_limits():
    for board in sample_maps(50, size=4, split="test", seed=1, max_hole_fraction=0.25):
        assert sum(row.count("H") for row in board.rows) <= 4
        plan = board.shortest_path(random.Random(0))
        assert board.walk(plan)[-1] == board.goal and len(plan) == board.distances[board.start]
        assert all(board[cell] != "H" for cell in board.walk(plan))


def test_splits_are_disjoint_under_the_symmetries_of_the_square():
    keys = {}
    for split in ("train", "validation", "test"):
        boards = sample_maps(150, size=3, split=split, seed=0, max_hole_fraction=0.4)
        assert len(set(boards)) == 150
        keys[split] = {board.canonical() for board in boards}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]


def test_canonical_is_the_same_for_all_eight_images_and_no_other():
    board = FrozenLakeMap(("SFH", "FFF", "HFG"))
    turned = FrozenLakeMap(tuple("".join(c) for c in zip(*board.rows[::-1])))
    mirrored = FrozenLakeMap(board.rows[::-1])
    other = FrozenLakeMap(("SHF", "FFF", "HFG"))
    assert board.canonical() == turned.canonical() == mirrored.canonical() != other.canonical()


def test_a_seed_fixes_everything():
    settings = {"tasks": ["plan_trace", "outcome"], "split": "train"}
    one, two = (frozen_lake_dataset({3: 4, 4: 2}, **settings, seed=5) for _ in range(2))
    other = frozen_lake_dataset({3: 4, 4: 2}, **settings, seed=6)
    assert one.to_dict() == two.to_dict() != other.to_dict()
    assert [board_of(sample).size for sample in one] == [3] * 8 + [4] * 4


def test_saved_and_loaded_with_its_images(tmp_path):
    data = frozen_lake_dataset({3: 2}, tasks=["plan_trace"], split="train")
    data.save_to_disk(tmp_path)
    loaded = load_from_disk(tmp_path)
    for sample, reloaded in zip(data, loaded):
        board = board_of(reloaded)
        walk = board.walk(reloaded["answer"].replace(" ", ""))
        images = [open_image(image, "images") for image in reloaded["images"]]
        assert len(images) == len(sample["images"]) == len(walk)
        assert np.array_equal(images[0], render_board(board))
        last_move = reloaded["answer"][-1]
        assert np.array_equal(images[-1], render_board(board, walk[-1], last_move))


def test_saved_samples_are_conversations_like_any_other(tmp_path):
    """`load_conversations` takes what was saved, and changes nothing."""
    data = frozen_lake_dataset({3: 2}, tasks=["plan_trace", "plan+moves"], split="train")
    data.save_to_disk(tmp_path)
    loaded = load_conversations(str(tmp_path))
    assert loaded.features == data.features
    for name in ("messages", "images", "answer"):
        assert loaded[name][:] == data[name][:]


def test_the_rows_are_those_that_the_published_results_were_trained_on():
    """Words, images and order of a seed; the pixels are those of gymnasium, see above."""
    data = frozen_lake_dataset({3: 3, 4: 2}, tasks=["plan_trace", "outcome", "plan+moves"], split="train", seed=7)
    words = [
        [message["role"], part["text"]] for row in data for message in row["messages"] for part in message["content"]
    ]
    digest = hashlib.sha256(json.dumps([words, data["answer"][:]]).encode()).hexdigest()
    assert (len(data), digest[:16]) == (15, "983a74511c6d2cea")


def test_load_task():
    task = load_task("frozen_lake", maps={3: 4}, test_maps={3: 3, 4: 2}, seed=1)
    assert isinstance(task, FrozenLake) and isinstance(load_task(f"{__name__}:Other", n=2), Other)
    trace, plan = task.dataset("test"), task.dataset("test", "answer")
    assert [task.reference(s) for s in trace] == [task.reference(s) for s in plan]  # the same questions
    assert [task.group(s) for s in trace] == ["3x3"] * 3 + ["4x4"] * 2
    assert len(task.dataset("train")) == 4 and any("goal" in text for text in task.texts())
    moves = trace[0]["answer"].split()
    pictures = task.draw(trace[0], " ".join(moves) + " \\boxed{U}")
    assert [caption for caption, _ in pictures] == [f"after {move}" for move in moves]
    assert np.array_equal(pictures[-1][1], open_image(trace[0]["images"][-1], "last"))
    check_refusals(task)
    for name in ("chess", "no.such.module:Task", f"{__name__}:Missing"):
        with pytest.raises(ValueError, match="There is no task .*package.module:Class"):
            load_task(name)


@pytest.mark.parametrize("question, latent_size", [("plan", 1), ("outcome", 2)])
def test_forms_say_the_same_in_their_own_way(question, latent_size):
    task = load_task("frozen_lake", maps={3: 2}, test_maps={3: 3, 6: 3}, question=question, latent_size=latent_size)
    forms = check_forms(task, "test", latent_size)
    for trace, text, equal in zip(forms["trace"], forms["text"], forms["text_equal"]):
        board = board_of(trace)
        words = words_of(trace, "user" if question == "outcome" else "assistant").split("Plan: ")[-1]
        plan = "".join(letter for letter in words.split("\\boxed")[0] if letter in MOVES)
        cells = board.walk(plan)[1:]
        end = f"\\boxed{{{trace['answer']}}}"
        assert words_of(trace, "assistant") == "".join(f" {move}" for move in plan) + end
        told = "".join(f" {move} {cell_name(cell)}" for move, cell in zip(plan, cells))
        assert words_of(text, "assistant") == f"{told} {end}"
        told = "".join(f" {move} {cell_name(cell)}{' …' * latent_size}" for move, cell in zip(plan, cells))
        assert words_of(equal, "assistant") == f"{told} {end}"
        assert [all_cells(board.size)[patch] for patch in task.followed_patches(trace)] == cells
        pictures = task.draw(trace, words_of(trace, "assistant"))
        for (_, picture), image in zip(pictures, trace["images"][1:], strict=True):
            assert np.array_equal(picture, open_image(image, "helper"))


def test_the_question_decides_the_metric():
    settings = {"maps": {3: 1}, "test_maps": {4: 12}}
    plan, outcome = load_task("frozen_lake", **settings), load_task("frozen_lake", **settings, question="outcome")
    sample = outcome.dataset("test", "answer")[0]
    assert plan.metric == "frozen_lake" and plan.reference(sample) == list(board_of(sample).rows)
    assert outcome.metric == "boxed_exact_match" and outcome.reference(sample) in ("A", "B", "C")
    assert outcome.title != plan.title and "neither (C)" in outcome.prompt


def test_base_is_asked_where_the_player_is():
    settings = {"maps": {3: 1}, "test_maps": {3: 1}, "base_maps": {3: 40}}
    task = load_task("frozen_lake", **settings, base_tasks=["where+describe", "plan+moves"])
    cells, starts = set(), 0
    for sample in task.dataset("train", "base"):
        asked, answer = (message["content"][-1]["text"] for message in sample["messages"][:2])
        if asked == task.helper_question:
            board, image = board_of(sample), open_image(sample["images"][0], "board")
            cell = next(cell for cell in all_cells(3) if answer == f"\\boxed{{{cell_name(cell)}}}")
            drawn = [render_board(board, cell, facing) for facing in (None, *MOVES)]
            assert any(np.array_equal(image, picture) for picture in drawn)
            cells.add(cell)
            starts += cell == board.start
    assert cells == set(all_cells(3)) and starts < 15  # anywhere, not only where a plan starts
    with pytest.raises(ValueError, match="'where' has the player on any cell and 'plan' on the start"):
        conversation(FrozenLakeMap(("SF", "FG")), "where+plan", random.Random(0))


def test_every_word_is_one_token_of_the_vocabulary():
    bases = {"base_maps": {3: 1, 8: 2}, "base_tasks": ["where+describe", "plan+moves", "distances"]}
    forms = ["trace", "answer", "text", "text_equal", "pads"]
    for question in ("plan", "outcome"):
        task = load_task("frozen_lake", maps={3: 2, 8: 3}, test_maps={4: 1}, question=question, **bases)
        check_vocabulary(task, [("train", "base"), *(("train", form) for form in forms)])


def test_bad_settings():
    for settings, message in [
        ({"maps": {2: 1}}, r"maps are for boards of size 3 to 8, got sizes \[2\]"),
        ({"base_maps": {9: 1}}, r"base_maps are for boards of size 3 to 8, got sizes \[9\]"),
        ({"question": "why"}, "question must be 'plan' or 'outcome', got 'why'"),
        ({"latent_size": 0}, "at least one latent"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_task("frozen_lake", **{"maps": {3: 1}, "test_maps": {3: 1}, **settings})


class Other(Task):
    """A task from elsewhere, with what it must have and no more."""

    title, metric, prompt = "Other", "boxed_exact_match", "What?"

    def __init__(self, n: int):
        self.n = n

    def dataset(self, split, form="trace"):
        return frozen_lake_dataset({3: self.n}, tasks=["plan"], split=split)

    def texts(self):
        return ["What?"]


def test_rules_of_the_walk():
    board = FrozenLakeMap.from_vsp_codes([[1, -1, 0], [0, 0, 0], [0, 0, 2]])
    assert board.rows == ("SHF", "FFF", "FFG")
    assert board.walk("LUD") == [(0, 0), (0, 0), (0, 0), (1, 0)]  # leaving the board = staying
    assert board.walk("RRR") == [(0, 0), (0, 1)]  # a hole ends it
    assert board.best_moves((0, 0)) == ["D"] and board.best_moves((1, 0)) == ["D", "R"]
    assert board.best_moves((2, 2)) == [] and board.distances[0, 0] == 4


def test_conversations():
    board = FrozenLakeMap(("SFH", "HFF", "HFG"))
    sample = conversation(board, "plan_trace", random.Random(0))
    parts = sample["messages"][1]["content"]
    moves = [part["text"] for part in parts if part["type"] == "text"]
    assert len(sample["images"]) == 1 + len(moves) - 1 and moves[:4] == [
        f" {move}" for move in sample["answer"].split()
    ]
    assert moves[-1] == "\\boxed{" + sample["answer"] + "}" and len(sample["answer"].split()) == 4
    several = conversation(board, "plan+moves+describe+distances", random.Random(0))
    assert len(several["images"]) == 1 and len(several["messages"]) == 8
    assert several["messages"][5]["content"][0]["text"] == "S F H\nH F F\nH F G"
    assert several["messages"][7]["content"][0]["text"] == "4 3 -\n- 2 1\n- 1 0"
    with pytest.raises(ValueError, match="Unknown FrozenLake task 'draw'"):
        conversation(board, "draw", random.Random(0))


def test_outcomes_are_balanced_and_true():
    data = frozen_lake_dataset({4: 150}, tasks=["outcome"], split="train", max_hole_fraction=0.3)
    counts = {letter: data["answer"].count(letter) for letter in "ABC"}
    assert min(counts.values()) > 25
    start = PROMPTS["outcome"].split("{plan}")[0]
    for sample in data.remove_columns("images"):
        board = board_of(sample)
        plan = sample["messages"][0]["content"][1]["text"].removeprefix(start).replace(" ", "")
        assert plan and set(plan) <= set(MOVES)
        last = board.walk(plan)[-1]
        assert sample["answer"] == {"G": "A", "H": "B"}.get(board[last], "C")


def test_an_outcome_has_a_plan_one_move_before_the_goal():
    """No hole can be reached, so that a third of the plans have to end elsewhere than drawn."""
    board = FrozenLakeMap(("SG", "FF"))
    asked = [conversation(board, "outcome", random.Random(seed)) for seed in range(30)]
    plans = [sample["messages"][0]["content"][1]["text"].split("Plan: ")[1] for sample in asked]
    assert all(plans) and {sample["answer"] for sample in asked} == {"A", "C"}


def test_bad_maps_and_requests():
    with pytest.raises(ValueError, match="square"):
        FrozenLakeMap(("SF", "FGF"))
    with pytest.raises(ValueError, match="exactly one start"):
        FrozenLakeMap(("SS", "FG"))
    with pytest.raises(ValueError, match="letters"):
        FrozenLakeMap(("SX", "FG"))
    with pytest.raises(ValueError, match="distinct 3x3 maps"):
        sample_maps(60, size=3, split="validation", seed=0, max_hole_fraction=0.2)
    with pytest.raises(ValueError, match="Unknown split"):
        sample_maps(5, size=3, split="dev", seed=0, max_hole_fraction=0.2)


def test_rendering_is_silent_and_headless():
    script = "from ilvr.tasks.frozen_lake import *; render_board(FrozenLakeMap(('SF', 'FG')))"
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "SDL_VIDEODRIVER", "SDL_AUDIODRIVER")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
