"""Readers: rows written by hand in each format, to conversations that the trainer takes."""

import gzip
import io
import json
import logging
import os
import shutil
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, IterableDataset, Value
from helpers import MIRAGE, MONET, MONET_SPAN, NATIVE, REFERENCE, ROWS, ZEBRA_COT, make_image, write_jsonl
from PIL import ExifTags, ImageFile
from PIL import Image as PILImage
from transformers.image_utils import load_image

from ilvr.data import SampleError, check_dataset, load_conversations, prompt_of
from ilvr.data.conversations import image_roles, last_boxed
from ilvr.data.images import image_size, locate_image, open_image
from ilvr.data.row_files import read_rows
from ilvr.data.sources import FORMATS, convert
from ilvr.trainer.inputs.data_preparation import prepare_dataset


VSP_EXAMPLES = Path(__file__).parents[3] / "shared" / "data" / "vsp_examples"


TEXT_ONLY = {"messages": [{"role": "user", "content": "Plan"}, {"role": "assistant", "content": "Right"}]}


def read(row, image_root, format=None):
    return convert(row, partial(locate_image, image_root=image_root.resolve()), format)[0]


def parts(sample):
    """Roles and parts; an image is `True`."""
    return [(m["role"], [p["text"] or p["type"] == "image" for p in m["content"]]) for m in sample["messages"]]


CONVERSATIONS = {
    "native": [("user", [True, "Plan"]), ("assistant", ["Right ", True]), ("user", ["Go on"]), ("assistant", ["Up"])],
    "reference": [("user", [True, "Plan"]), ("assistant", ["Right ", True, "\\boxed{R}"])],
    "mirage": [("user", ["Here is ", True, " Plan"]), ("assistant", ["Right ", True, "\\boxed{\\text{R}}"])],
    "zebra_cot": [
        ("user", ["See ", True, " Plan"]),
        ("assistant", ["Right ", True, " as in ", "\n\nThe final answer is: R"]),
    ],
    "monet": [
        ("system", ["Think."]),
        ("user", [True, "Plan"]),
        ("assistant", ["Right ", True, "Up \\boxed{R}"]),
    ],
}
ANSWERS = {"native": "Up", "reference": "R", "mirage": "\\text{R}", "zebra_cot": "R", "monet": "R"}
METADATA = {"reference": {"map_desc": [[1, 2], [0, -1]]}, "monet": {"metadata": MONET["metadata"]}}


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_to_a_conversation(format, image_root):
    sample, recognised = convert(ROWS[format], partial(locate_image, image_root=image_root.resolve()))
    assert recognised == format
    assert parts(sample) == CONVERSATIONS[format]
    assert [Path(image["path"]).name for image in sample["images"]] == ["board.png", "step 1.png"]
    assert sample["answer"] == ANSWERS[format]
    assert json.loads(sample["metadata"]) == METADATA.get(format, {})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_the_trainer_takes_what_is_read(format, streaming, image_root, tmp_path, processor):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[format]] * 2)
    dataset = load_conversations(path, image_root=str(image_root), streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    prepared = list(prepare_dataset(dataset, processor, stage=1))
    assert len(prepared) == 2 and prepared[0]["length"] == len(prepared[0]["input_ids"])
    for sample in prepared:
        assert [len(sample["user_images"]), len(sample["helper_images"])] == [1, 1]
        pad = processor.latent_token_ids[1]
        assert sample["input_ids"].count(pad) == processor.latent_size


def test_images_are_decoded_when_they_are_used(image_root, tmp_path):
    (image_root / "step 1.png").write_bytes(b"no image, and nobody looks at it")
    path = write_jsonl(tmp_path / "rows.jsonl", [REFERENCE])
    (sample,) = load_conversations(path, image_root=str(image_root))
    assert sample["images"][0] == {"bytes": None, "path": str((image_root / "board.png").resolve())}


def test_the_images_lie_beside_the_file_by_default(image_root):
    path = write_jsonl(image_root / "rows.jsonl", [MIRAGE, NATIVE])
    assert load_conversations(path)["answer"] == ["\\text{R}", "Up"]


def test_a_changed_file_is_read_again(image_root):
    path = image_root / "rows.jsonl"
    assert len(load_conversations(write_jsonl(path, [MIRAGE]))) == 1
    assert len(load_conversations(write_jsonl(path, [MIRAGE] * 2))) == 2


def test_json_array_of_monet_with_line_numbers(image_root):
    path = image_root / "train.json"
    path.write_text(json.dumps([MONET] * 3, indent=1))
    assert load_conversations(str(path))["answer"] == ["R"] * 3
    lines = path.read_text().splitlines()
    numbers = [number for number, _, _ in read_rows(path)]
    assert [lines[number - 1] for number in numbers] == [" {"] * 3


def test_json_array_longer_than_a_chunk(tmp_path, monkeypatch):
    rows = [{"text": "line\n" * i, "number": i} for i in range(30)]
    for indent in (None, 2):
        (tmp_path / "rows.json").write_text("\ufeff " + json.dumps(rows, indent=indent) + "\n", encoding="utf-8")
        for size in (1, 7, 64, 1 << 20):
            monkeypatch.setattr("ilvr.data.row_files.CHUNK_CHARACTERS", size)
            assert [row for _, row, _ in read_rows(tmp_path / "rows.json")] == rows


def test_json_array_that_breaks_off_or_is_malformed(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n{"a": ')
    good, bad = read_rows(path)
    assert good[:2] == (1, {"a": 1}) and bad[0] == 2 and "what follows in the array cannot be read" in str(bad[1])
    path.write_text('[\n{"a": 1}\n')
    assert "the array has no end" in str(list(read_rows(path))[1][1])
    path.write_bytes(b'[{"messages": "\xff"}]')
    assert next(read_rows(path))[1]["messages"] == "\udcff"
    path.write_text('[3, {"a": 1}]')
    assert [str(row) for _, row, _ in read_rows(path)] == [
        "row: must be a JSON object, got 3. Correct or remove it.",
        "{'a': 1}",
    ]
    # The end of a malformed row is not looked for in the whole file.
    monkeypatch.setattr("ilvr.data.row_files.CHUNK_CHARACTERS", 100)
    monkeypatch.setattr("ilvr.data.row_files.MAX_ROW_CHARACTERS", 1000)
    path.write_text('[{"a" 1},' + '{"a": 1},' * 10000 + "]")
    ((_, error, progress),) = read_rows(path)
    assert isinstance(error, SampleError) and progress < 5000


GOOD = '{"a": 1}'


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "text, good, line, message",
    [
        (f"[{GOOD}]\n\n{GOOD}\n{GOOD}\n", 1, 3, "goes on behind the end of the array"),
        (f"[{GOOD},\n{GOOD}]\n[{GOOD}]\n", 2, 3, "goes on behind the end of the array"),
        (f"[{GOOD}] garbage", 1, 1, "goes on behind the end of the array"),
        (f"[]\n{GOOD}\n", 0, 2, "goes on behind the end of the array"),
        (f"[{GOOD}\n{GOOD}]", 1, 2, "a comma is missing between two rows"),
        (f"[{GOOD},\n,{GOOD}]", 1, 2, "no JSON"),
        (f"[{GOOD},\n]", 1, 2, "no JSON"),
        (f"[,{GOOD}]", 0, 1, "no JSON"),
    ],
)
def test_what_follows_a_row_or_an_array_is_read(text, good, line, message, size, tmp_path, monkeypatch):
    monkeypatch.setattr("ilvr.data.row_files.CHUNK_CHARACTERS", size)
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    *rows, (number, error, _) = read_rows(path)
    assert [row for _, row, _ in rows] == [{"a": 1}] * good
    assert number == line and message in str(error)


def test_a_line_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("ilvr.data.row_files.MAX_ROW_CHARACTERS", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{GOOD}\n{{"a": "' + "x" * 100_000)
    (_, row, _), (number, error, progress) = read_rows(path)
    assert row == {"a": 1} and number == 2 and progress == 1000
    assert str(error) == "line: is longer than 1000 bytes. Split it; what follows cannot be read."


def test_keys_given_twice_and_deep_nesting(tmp_path):
    path = tmp_path / "rows.jsonl"
    for wrap in ("{}\n{}\n{}\n", "[{},\n{},\n{}]"):
        bad = ['{"a": 1, "a": 2}', '{"b": [{"a": 1, "a": 2}]}', '{"a": ' + "[" * 300 + "]" * 300 + "}"]
        path.write_text(wrap.format(*bad))
        first, second, deep = [str(row) for _, row, _ in read_rows(path)]
        assert first == second == "row: the key 'a' is given 2 times. Keep one of them."
        assert deep == "row: is nested more than 100 deep. Flatten it or leave the sample out."


@pytest.mark.skipif(not VSP_EXAMPLES.exists(), reason="the VSP examples are not part of the repository")
def test_vsp_examples(tmp_path, processor):
    # `./data/examples/` stands for the folder of the examples.
    rows = (VSP_EXAMPLES / "sample.jsonl").read_text().replace("./data/examples/", "")
    (tmp_path / "sample.jsonl").write_text(rows)
    dataset = load_conversations(str(tmp_path / "sample.jsonl"), image_root=str(VSP_EXAMPLES))
    assert len(dataset) == 10 and set(dataset["answer"]) <= set("ABC")
    question, answer = parts(dataset[0])
    assert question[1][0].endswith("Here is the map: ") and question[1][1] is True
    assert answer[1][1] is True and answer[1][2].endswith("\\boxed{A}.")
    assert "<image>" not in str(dataset["messages"][:]) and "<output_image>" not in str(dataset["messages"][:])
    assert len(prepare_dataset(dataset.select([0]), processor, stage=1)) == 1


# Rows of data sets, with embedded images.


def zebra_dataset(image_root) -> Dataset:
    images = {
        name: {"bytes": (image_root / ZEBRA_COT[name]).read_bytes(), "path": ZEBRA_COT[name]}
        for name in ("problem_image_1", "reasoning_image_1")
    }
    rows = [{**ZEBRA_COT, **images}, {**ZEBRA_COT, **images, "Final Answer": None}]
    features = {name: Image() if "image" in name else Value("string") for name in ZEBRA_COT}
    return Dataset.from_list(rows, features=Features(features))


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_parquet_file_and_a_saved_folder(streaming, image_root, tmp_path, caplog):
    dataset = zebra_dataset(image_root)
    (tmp_path / "zebra").mkdir()
    dataset.to_parquet(tmp_path / "zebra" / "train.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "zebra", tmp_path / "zebra" / "train.parquet", tmp_path / "saved"):
        with pytest.raises(ValueError, match=r"sample 1: Final Answer: is missing"):
            list(load_conversations(str(path), streaming=streaming))
        with caplog.at_level(logging.WARNING):
            (sample,) = load_conversations(str(path), streaming=streaming, skip_bad_samples=True)
        assert "sample 1: Final Answer: is missing" in caplog.text and "left out" in caplog.text
        assert parts(sample) == CONVERSATIONS["zebra_cot"]
        assert [open_image(image, "").size for image in sample["images"]] == [(32, 32)] * 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("format", ["native", "reference", "mirage"])
def test_a_folder_of_json_lines(format, streaming, image_root):
    write_jsonl(image_root / "train.jsonl", [ROWS[format]] * 3)
    samples = list(load_conversations(str(image_root), streaming=streaming))
    assert len(samples) == 3 and parts(samples[2]) == CONVERSATIONS[format]
    assert Path(samples[2]["images"][1]["path"]).name == "step 1.png"


@pytest.mark.parametrize("streaming", [False, True])
def test_names_are_no_patterns(streaming, tmp_path, monkeypatch):
    folder = tmp_path / "br[a]ck"
    folder.mkdir()
    for name, count in (("p1", 3), ("p[1]", 7), ("p*", 5)):
        Dataset.from_list([TEXT_ONLY] * count).to_parquet(folder / f"{name}.parquet")
    for name, count in (("p1", 3), ("p[1]", 7), ("p*", 5)):
        assert len(list(load_conversations(str(folder / f"{name}.parquet"), streaming=streaming))) == count
    with pytest.raises(ValueError, match=r"is a pattern for `datasets`. Rename the folder"):
        load_conversations(str(folder), streaming=streaming)
    monkeypatch.chdir(folder)
    assert len(list(load_conversations("p[1].parquet", streaming=streaming))) == 7


@pytest.mark.parametrize("streaming", [False, True])
def test_data_that_cannot_be_read_are_named(streaming, tmp_path):
    line = (json.dumps(TEXT_ONLY) + "\n").encode()
    files = {
        "cut/rows.jsonl.gz": gzip.compress(line * 1000)[:-20],
        "types/a.jsonl": line,
        "types/b.jsonl": b'{"messages": 3}\n',
        "none/rows.jsonl": b"",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    Dataset.from_dict({"messages": []}).save_to_disk(tmp_path / "saved")
    for name, message in (
        ("cut", "cut cannot be read: Compressed file ended"),
        ("types", "types cannot be read: Couldn't cast"),
        ("none", "none has no rows"),
        ("saved", "saved has no rows"),
    ):
        if not (streaming and name == "types"):  # of which only the first row is read before the user's own loop
            with pytest.raises(ValueError, match=message):
                load_conversations(str(tmp_path / name), streaming=streaming)
        with pytest.raises(ValueError, match=message):
            check_dataset(str(tmp_path / name), show_progress=False)
    with pytest.raises(ValueError, match="The path of the data is empty"):
        load_conversations("", streaming=streaming)


def test_data_files_that_a_folder_load_leaves_out_are_named(tmp_path, caplog):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "rows.jsonl", [TEXT_ONLY])
    (folder / "README.md").write_text("About the rows")
    with caplog.at_level(logging.WARNING):
        assert len(load_conversations(str(folder))) == 1 and "left out" not in caplog.text
        (folder / "more.txt").write_text("a row")
        assert len(load_conversations(str(folder))) == 1
    assert "1 data files are left out" in caplog.text and "more.txt" in caplog.text


def test_capital_letters_and_splits(tmp_path):
    path = write_jsonl(tmp_path / "rows.JSONL", [TEXT_ONLY] * 2)
    assert len(load_conversations(path)) == 2
    load_conversations(path).save_to_disk(tmp_path / "saved")
    for source in (path, str(tmp_path / "saved")):
        assert len(load_conversations(source, split="test")) == 2
        for streaming in (False, True):
            with pytest.raises(ValueError, match=r"split='train\[:1\]': .* has one split. Take part of it with"):
                load_conversations(source, split="train[:1]", streaming=streaming)


def test_embedded_images_are_not_replaced_by_a_file_of_that_name(image_root, tmp_path):
    secret = tmp_path / "secret.png"
    make_image("blue").save(secret)
    data = (image_root / "board.png").read_bytes()
    located = locate_image({"bytes": data, "path": str(secret)}, "image", None)
    assert located == {"bytes": data, "path": None}
    with pytest.raises(SampleError, match="is not embedded in the data. Say which folder holds it: image_root"):
        locate_image({"bytes": None, "path": str(secret)}, "image", None)


# Confinement.


def test_paths_may_not_leave_the_image_root(image_root, tmp_path):
    make_image("blue").save(tmp_path / "outside.png")
    (image_root / "link.png").symlink_to(tmp_path / "outside.png")
    (image_root / "up").symlink_to(tmp_path)
    (image_root / "inside.png").symlink_to(image_root / "board.png")
    (tmp_path / "images2").mkdir()
    make_image("blue").save(tmp_path / "images2" / "board.png")
    for bad in ("../outside.png", str(tmp_path / "outside.png"), "link.png", "up/outside.png", "../images2/board.png"):
        path = write_jsonl(tmp_path / "rows.jsonl", [REFERENCE, {**REFERENCE, "image_input": [bad]}])
        for streaming in (False, True):
            with pytest.raises(ValueError, match=r"line 2: image_input\[0\]: the image .* lies outside image_root"):
                list(load_conversations(path, image_root=str(image_root), streaming=streaming))
    for good in ("inside.png", str(image_root / "board.png"), "../images/board.png", "up/images/board.png"):
        located = read({**REFERENCE, "image_input": [good]}, image_root)["images"][0]
        assert located["path"] == str((image_root / "board.png").resolve())


def test_an_image_root_may_itself_be_a_link(image_root, tmp_path):
    (tmp_path / "link").symlink_to(image_root)
    path = write_jsonl(tmp_path / "rows.jsonl", [REFERENCE])
    assert len(load_conversations(path, image_root=str(tmp_path / "link"))) == 1


@pytest.mark.parametrize(
    "bad", ["missing.png", ".", "", None, 3, "a\0b", "\ud800", {"path": None}, ["board.png"], "x" * 5000]
)
def test_what_is_no_image_path(bad, image_root):
    with pytest.raises(SampleError, match=r"images\[0\]: (there is no file|an image must be given by its path)"):
        read({**NATIVE, "images": [bad, "step 1.png"]}, image_root)


def test_pipes_and_loops_are_not_followed(image_root):
    os.mkfifo(image_root / "pipe.png")
    (image_root / "loop.png").symlink_to("loop.png")
    for name in ("pipe.png", "loop.png"):
        with pytest.raises(SampleError, match="there is no file"):
            locate_image(name, "image", image_root.resolve())


# Images.


def test_bombs_are_refused_by_their_header(image_root, monkeypatch):
    make_image("red", 64).save(image_root / "large.png")
    monkeypatch.setattr(PILImage.Image, "load", lambda *_: pytest.fail("was decoded"))
    for limit in (4000, 1000):  # PIL warns up to twice the limit, and raises above
        monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", limit)
        for function in (open_image, image_size):
            with pytest.raises(ValueError, match="Image 3 .* too large, as a decompression bomb would be.*Shrink it"):
                function({"bytes": None, "path": str(image_root / "large.png")}, "Image 3")


def test_header_and_pixels(image_root):
    path = str(image_root / "board.png")
    image = {"bytes": Path(path).read_bytes(), "path": None}
    assert image_size(path, "") == image_size(image, "") == image_size(make_image("red"), "") == (32, 32)
    assert open_image(path, "").mode == "RGB" and open_image(make_image("red"), "").size == (32, 32)
    half = {"bytes": image["bytes"][:-30], "path": None}
    assert image_size(half, "") == (32, 32)
    for broken in (half, {"bytes": b"no image", "path": None}, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match=r"Image 3 \(bytes\) is no image that can be read: .* Replace it"):
            open_image(broken, "Image 3")
    with pytest.raises(ValueError, match="Image 3: there is no file nowhere.png"):
        image_size("nowhere.png", "Image 3")


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_are_turned_as_at_inference(format, tmp_path, monkeypatch):
    for orientation in (1, 3, 6, 8):
        exif = PILImage.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        image = PILImage.linear_gradient("L").resize((96, 64)).convert("RGB")
        path = tmp_path / f"turned.{format.lower()}"
        path.write_bytes(encoded(image, format, exif=exif))
        opened = open_image(str(path), "")
        assert opened.size == ((96, 64) if orientation < 5 else (64, 96))
        assert opened.tobytes() == load_image(str(path)).tobytes()
        with PILImage.open(path) as lazy:
            assert open_image(lazy, "").tobytes() == opened.tobytes()
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("was decoded"))
            assert image_size(str(path), "") == opened.size
            with PILImage.open(path) as lazy:
                assert image_size(lazy, "") == opened.size


def test_colours_are_those_at_inference(tmp_path):
    transparent = PILImage.new("RGBA", (4, 4), (200, 10, 20, 0))
    images = {"RGBA": transparent, "P": transparent.convert("P"), "LA": transparent.convert("LA")}
    images |= {mode: PILImage.new(mode, (4, 4), 1) for mode in ("1", "L")}
    for name, image in images.items():
        path = tmp_path / f"{name}.png"
        image.save(path)
        assert open_image(str(path), "").tobytes() == load_image(str(path)).tobytes()


@pytest.mark.parametrize("mode, format", [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF")])
def test_deep_colours_are_refused_and_not_clipped(mode, format):
    image = PILImage.new(mode, (4, 4))
    for value in (image, {"bytes": encoded(image, format), "path": None}):
        for function in (open_image, image_size):
            with pytest.raises(
                ValueError, match=rf"Image 3.* more than 8 bits a channel \(mode {mode}\).*Scale it to 8"
            ):
                function(value, "Image 3")


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # is looked for on the PATH
    path = tmp_path / "x.png"
    path.write_bytes(encoded(make_image("red"), "EPS"))
    with pytest.raises(ValueError, match="Image 3 .* is no image that can be read"):
        open_image(str(path), "Image 3")
    assert not started.exists()


@pytest.mark.parametrize("format, whole, broken", [("AVIF", b"iloc", b"xxxx"), ("WEBP", b"VP8 ", b"VP8L")])
def test_decoders_that_fail_name_the_image(format, whole, broken):
    data = encoded(make_image("red"), format).replace(whole, broken)
    for function in (open_image, image_size):
        with pytest.raises(ValueError, match=r"Image 3 \(bytes\) is no image that can be read"):
            function({"bytes": data, "path": None}, "Image 3")


# Bad rows: each error names the field and the remedy.


def changed(row, **changes):
    return {**row, **changes}


BAD_ROWS = [
    ({"\ud800": 1}, r"row: the fields .*ud800.* fit no known format"),
    ({"a": 1}, r"row: the fields \['a'\] fit no known format \(native: messages; reference: .*Name it: `format`"),
    (changed(REFERENCE, text_output="x"), "row: fits the formats reference and mirage. Name it: `format`"),
    (changed(REFERENCE, text_input=3), "text_input: must be a text, got 3"),
    (changed(REFERENCE, text_input="two <image> <image>"), "text_input: the text has 2 times <image>, .* 1 images"),
    (changed(REFERENCE, text_input="<|latent_pad|>"), r"text_input: the text holds <\|latent_pad\|>.*remove them"),
    (changed(REFERENCE, text_input="\ud800"), "text_input: the text is no valid Unicode"),
    (changed(REFERENCE, text_input=" "), "user turn: has no words"),
    (changed(REFERENCE, image_input={"a": 1}), "image_input: must be a list"),
    (changed(REFERENCE, sequence_plan="Right"), "sequence_plan: must be a list, got 'Right'"),
    (changed(REFERENCE, sequence_plan=["Right"]), r"sequence_plan\[0\]: must be a dict, got 'Right'"),
    (
        changed(REFERENCE, sequence_plan=[{"type": "sound"}]),
        r"sequence_plan\[0\].type: unknown type 'sound'. Use",
    ),
    (changed(REFERENCE, sequence_plan=[{"type": "text"}]), r"sequence_plan\[0\].content: must be a text, got None"),
    (
        changed(REFERENCE, sequence_plan=[{"type": "latent"}]),
        r"sequence_plan\[0\].helper_image: an image must be",
    ),
    (changed(REFERENCE, sequence_plan=[]), "assistant turn: has no words"),
    (changed(MIRAGE, text_output="\\boxed{R}"), "text_output: the text has 0 times <output_image>, but .* 1 images"),
    (changed(MIRAGE, image_output=None), "text_output: the text has 1 times <output_image>, but there are 0 images"),
    (changed(MIRAGE, image_output="lost.png"), "image_output: there is no file .*lost.png"),
    (changed(MIRAGE, text_output=["R"]), "text_output: "),
    (changed(ZEBRA_COT, **{"Final Answer": None}), "Final Answer: is missing; the row has Question, "),
    (changed(ZEBRA_COT, Question=7), "Question: must be a text, got 7"),
    (changed(ZEBRA_COT, reasoning_image_1=None), "Text Reasoning Trace: names reasoning_image_1, but the row has no"),
    (changed(ZEBRA_COT, reasoning_image_2="board.png"), "reasoning_image_2: the trace does not say where it belongs"),
    (
        changed(ZEBRA_COT, Question="<image_start>[reasoning_image_1]<image_end> Plan"),
        "Question: names reasoning_image_1, which would show a step of the answer",
    ),
    (changed(MONET, data=[{"role": "critic", "content": []}]), r"data\[0\].role: unknown role 'critic'. Use one of"),
    (changed(MONET, data=MONET["data"][:2]), "assistant turn: has no words"),
    (changed(MONET, data=[{"role": "user"}]), r"data\[0\].content: must be a list, got None"),
    (changed(MONET, data=[{"role": "user", "content": [{"type": "video"}]}]), r"data\[0\].content\[0\]: unknown type"),
    (
        changed(
            MONET, data=[*MONET["data"], {"role": "assistant", "content": [{"type": "text", "text": MONET_SPAN}]}]
        ),
        "data: has 2 times <abs_vis_token></abs_vis_token> for 1 helper images",
    ),
    (changed(NATIVE, images=["board.png"]), r"messages\[1\].content\[1\]: is an image part, but `images` has only 1"),
    (
        changed(NATIVE, images=["board.png"] * 3),
        "images: has 3 images for 2 image parts without a path in `messages`. Add a part",
    ),
    (
        changed(NATIVE, messages=[{"role": "user", "content": [{"type": "video"}]}]),
        "unknown type 'video'",
    ),
    *[(changed(NATIVE, images=none), f"images: must be a list, got {none!r}") for none in (0, "", False)],
    *[(changed(REFERENCE, image_input=none), f"image_input: must be a list, got {none!r}") for none in (0, False)],
    (changed(REFERENCE, image_input=""), r"image_input\[0\]: an image must be given by its path"),
    (changed(MIRAGE, image_output=""), "image_output: an image must be given by its path"),
    (changed(NATIVE, answer="\ud800"), "answer: the text is no valid Unicode"),
    (
        changed(REFERENCE, sequence_plan=[{"type": "text", "content": text} for text in ("a<|lat", "ent_", "pad|>")]),
        r"sequence_plan\[2\].content: the text holds <\|latent_pad\|>",
    ),
    (
        changed(
            ZEBRA_COT,
            **{"Text Reasoning Trace": "<|latent_<image_start>[problem_image_1]<image_end>start|> x"},
        ),
        r"Text Reasoning Trace: the text holds <\|latent_start\|>",
    ),
    (changed(NATIVE, messages="hello"), "messages: must be a list, got 'hello'"),
]


@pytest.mark.parametrize("row, message", BAD_ROWS)
def test_bad_rows(row, message, image_root):
    with pytest.raises(SampleError, match=message) as caught:
        read(row, image_root)
    assert str(caught.value).startswith(caught.value.field)


def test_an_image_part_may_name_its_file(image_root):
    user = {"role": "user", "content": [{"type": "image", "path": "step 1.png"}, {"type": "image"}]}
    row = changed(NATIVE, messages=[user, *NATIVE["messages"]], images=["board.png"] * 3)
    names = [Path(image["path"]).name for image in read(row, image_root)["images"]]
    assert names == ["step 1.png", "board.png", "board.png", "board.png"]
    user["content"][0]["path"] = "../secret.png"
    with pytest.raises(SampleError, match=r"messages\[0\].content\[0\].path: the image .* lies outside"):
        read(row, image_root)


@pytest.mark.parametrize("given", ["path", "encoded", "image"])
def test_the_prompt_of_a_sample(given, image_root, processor):
    sample = read(NATIVE, image_root)
    paths = [image["path"] for image in sample["images"]]
    images = {
        "path": paths,
        "encoded": [{"bytes": Path(path).read_bytes(), "path": None} for path in paths],
        "image": [PILImage.open(path) for path in paths],
    }[given]
    prompt = prompt_of({**sample, "images": images})
    ((shown, text),) = [turn["content"] for turn in prompt]
    assert prompt[0]["role"] == "user" and text == {"type": "text", "text": "Plan"}
    assert shown["image"].tobytes() == open_image(paths[0], "").tobytes()
    inputs = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert "pixel_values" in inputs
    with pytest.raises(ValueError, match="has 1 image parts for 0 images"):
        prompt_of({**sample, "images": []})
    plain = {"messages": [{"role": "user", "content": "Plan"}, {"role": "assistant", "content": "Up"}]}
    assert prompt_of(plain) == [{"role": "user", "content": [text]}]
    assert image_roles(sample["messages"]) == ["user", "assistant"] and image_roles(plain["messages"]) == []


def test_a_named_format_is_the_one_that_is_read(image_root):
    assert read(changed(REFERENCE, text_output="x"), image_root, "reference")["answer"] == "R"
    with pytest.raises(SampleError, match="sequence_plan: is missing; the row has text_input, image_input"):
        read(MIRAGE, image_root, "reference")


def test_zebra_images_that_the_question_does_not_name_come_first(image_root):
    row = changed(ZEBRA_COT, Question="Plan", problem_image_2="step 1.png", problem_image_10="board.png")
    sample = read(row, image_root)
    assert parts(sample)[0] == ("user", [True, True, True, "Plan"])
    assert [Path(image["path"]).name[0] for image in sample["images"]] == ["b", "s", "b", "s"]


def test_malformed_and_skipped_lines(image_root, caplog):
    path = image_root / "rows.jsonl"
    path.write_text(json.dumps(REFERENCE) + "\n\n{oh\n[]\n" + json.dumps(MIRAGE) + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: line: is no JSON: .* Correct or remove it."):
        load_conversations(str(path))
    with caplog.at_level(logging.WARNING):
        dataset = load_conversations(str(path), skip_bad_samples=True)
    assert dataset["answer"] == ["R", "\\text{R}"]
    assert [f"jsonl, line {i}:" in caplog.text for i in range(1, 6)] == [False, False, True, True, False]
    path.write_text("[" * 100_000 + "\n")
    assert isinstance(next(read_rows(path))[1], SampleError)
    path.write_text('{"a": "' + "[" * 100_000 + '"}\n{"a": ' + "[" * 100_000 + "\n")
    assert [type(row) for _, row, _ in read_rows(path)] == [dict, SampleError]


def test_requests_that_cannot_be_met(image_root):
    empty = image_root / "empty.jsonl"
    empty.write_text("")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="empty.jsonl has no good samples. `ilvr check-data` says why"):
            list(load_conversations(str(empty), streaming=streaming))
    with pytest.raises(ValueError, match="There is no file nowhere.jsonl"):
        load_conversations("nowhere.jsonl")
    with pytest.raises(ValueError, match="image_root=nowhere is no folder"):
        load_conversations(str(empty), image_root="nowhere")
    with pytest.raises(ValueError, match=r"Unknown format 'llava'; choose one of \['native', "):
        load_conversations(str(empty), format="llava")


def test_the_last_box():
    assert last_boxed("\\boxed{A} or \\boxed{\\frac{\\sqrt{2}}{2}}.") == "\\frac{\\sqrt{2}}{2}"
    assert last_boxed("nothing") is None and last_boxed("\\boxed{open") is None


def test_streaming_takes_the_memory_of_a_row(image_root):
    path = image_root / "rows.jsonl"
    line = json.dumps({**REFERENCE, "note": "x" * 60_000}) + "\n"
    with open(path, "w") as file:
        file.writelines([line] * 300)
    array = shutil.copy(path, image_root / "rows.json")
    Path(array).write_text("[" + ",".join([line] * 300) + "]")
    for source in (path, array):
        tracemalloc.start()
        assert sum(1 for _ in load_conversations(str(source), streaming=True)) == 300
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8_000_000 < path.stat().st_size / 2
