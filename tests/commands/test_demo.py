"""`ilvr demo`: what it shows of an answer and of one span, what it refuses, and the page in a browser."""

import base64
import io
import re
import socket
import sys
import time
from dataclasses import replace

import pytest
from browser import CHROMIUM, Browser
from gradio import Blocks
from helpers import make_image
from PIL import Image

from ilvr.evaluation import Questions
from ilvr.tasks import load_task
from ilvr_commands.demo_asking import MIRRORED, Demo, Subject, read_upload
from ilvr_commands.demo_html import row, trace_html
from ilvr_commands.demo_page import serve
from ilvr_commands.main import main


QUESTION = "Where is the player?"


@pytest.fixture
def demo(model, processor):
    questions = Questions.of_task(load_task("shifts", boards=1, test_boards=4, lengths=[2, 3]))
    bias = [[[processor.latent_token_ids[0]], 6.0]]
    return Demo(model, processor, questions, max_new_tokens=24, sequence_bias=bias)


@pytest.fixture
def uploads(tmp_path):
    make_image("red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("1", (5000, 5000)).save(tmp_path / "wide.png")
    (tmp_path / "heavy.png").write_bytes(bytes(10_000_001))
    return tmp_path


def ask(demo, subject, question=QUESTION):
    return list(demo.ask(subject, question))[-1]


# --------------------------------------------------------------------------------------------------------- no browser


def test_an_example_and_one_of_its_spans(demo):
    subject, picture, question, *_ = demo.choose(1)
    assert 'src="data:image/png;base64,' in picture and question.startswith("Where does the player end?")
    *growing, (shown, asked, _) = demo.ask(subject, question)
    assert all(stage[1] is None and "disabled" in stage[0] for stage in growing if "button" in stage[0])
    assert asked.example == 1 and "disabled" not in shown and "This answer is wrong; right is" in shown
    stages = list(demo.look(asked, 2))
    assert "Answering again" in stages[0] and "Answering again" not in stages[-1]
    assert asked.donor_name == "of example 3" and re.search(r"span \d+ of example 3", stages[-1])
    assert stages[-1].count("<tr>") == 7 and stages[-1].count('class="chip replaced">2<') == 4
    original, again = re.findall(r"<tr><td>its own.*?</td><td>(.*?)</td>", stages[-1])
    assert original == again and "<mark>" not in original
    png = re.search(r"base64,([^\"]+)", stages[-1])[1]
    assert Image.open(io.BytesIO(base64.b64decode(png))).width > 300
    donor = asked.donor
    assert list(demo.look(asked, 1)) and asked.donor is donor  # which is asked once


def test_an_image_of_ones_own_has_its_mirror_as_donor(demo, uploads):
    subject, picture, shown, *_ = demo.upload(str(uploads / "red.png"))
    assert subject.example is None and "data:image/png" in picture and shown == ""
    _, asked, _ = ask(demo, subject)
    *_, found = demo.look(asked, 1)
    assert asked.donor_name == MIRRORED and MIRRORED in found and found.count("<tr>") == 7


def test_another_question_about_an_example_is_no_example(demo):
    shown, asked, _ = ask(demo, demo.choose(0)[0])
    assert asked.example is None and "wrong" not in shown


def test_without_spans_and_cut_off(demo, processor):
    start = processor.latent_token_ids[0]
    demo.settings = {"max_new_tokens": 4, "suppress_tokens": [start]}
    shown, asked, _ = ask(demo, Subject(make_image("red")))
    assert "This answer has no span" in shown and "Cut off after 4 tokens: --max_new_tokens." in shown
    (message,) = demo.look(asked, 1)
    assert "Span 1 was cut off" in message and not list(demo.look(None, 1))
    demo.settings = {"max_new_tokens": 24, "sequence_bias": [[[start], 6.0]]}
    _, other, _ = ask(demo, Subject(make_image("red")))
    other.donor, other.donor_name = asked.trace, MIRRORED
    *_, found = demo.look(other, 1)
    assert f"The answer {MIRRORED} has no span to swap in." in found and found.count("<tr>") == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [("broken.png", "no image that can be read"), ("wide.png", "16 megapixels"), ("heavy.png", "Shrink it to 10 MB")],
)
def test_uploads_that_are_refused(demo, uploads, name, message):
    subject, shown, *_ = demo.upload(str(uploads / name))
    assert subject is None and message in shown and 'role="alert"' in shown and str(uploads) not in shown
    with pytest.raises(ValueError, match=message):
        read_upload(str(uploads / name))


def test_questions_that_are_refused(demo):
    subject = Subject(make_image("red"))
    assert "no image yet" in ask(demo, None)[0]
    assert "question is empty" in ask(demo, subject, " \n")[0]
    assert "Shorten it to 4000" in ask(demo, subject, "x" * 4001)[0]


def test_what_a_model_says_is_escaped(demo):
    _, asked, _ = ask(demo, Subject(make_image("red")))
    trace = replace(asked.trace, text="<script>alert(1)</script> \\boxed{<b>}")
    assert "<script" not in trace_html(trace) and "<b>" not in row("<i>", trace, asked.trace, 0).replace("<i>", "")


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "ilvr_commands.demo_page")
    assert main(["demo", "nowhere"]) == 2
    assert capsys.readouterr().err == (
        "ilvr demo: gradio is not installed. Add the extra `demo`: pip install 'ilvr[demo]'.\n"
    )


def test_the_command(demo, processor, tmp_path, monkeypatch, capsys):
    """From its arguments to a page that is served, and one line for a port that is taken."""
    demo.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pages = []
    monkeypatch.setattr(Blocks, "block_thread", lambda page: pages.append(page))
    settings = '{"boards": 1, "test_boards": 4, "lengths": [2, 3]}'
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    arguments = ["demo", str(tmp_path), "--task", "shifts", "--task_settings", settings, "--port", port]
    try:
        assert main(arguments) == 0 and len(pages) == 1
        assert f"http://127.0.0.1:{port}/ shows the page" in capsys.readouterr().err
        assert main(arguments) == 2 and port in capsys.readouterr().err.splitlines()[-1]
    finally:
        for page in pages:
            page.close(verbose=False)


# ---------------------------------------------------------------------------------------------------------- a browser


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page(demo, uploads):
    page, url = serve(demo)
    try:
        with Browser() as browser:
            visit(browser, url, uploads)
    finally:
        page.close(verbose=False)


def visit(browser, url, uploads):
    browser.call("Page.navigate", url=url)
    browser.wait("document.querySelector('#picture img') && document.querySelector('#question textarea').value")
    first = browser.run("document.querySelector('#picture img').src")
    browser.click("#example input")
    browser.wait("document.querySelectorAll('[role=option]').length == 4")
    browser.click("[role=option]:nth-of-type(3)")
    browser.wait(f"document.querySelector('#picture img').src != {first!r}")

    browser.click("#ask")
    browser.wait("document.querySelector('#trace .trace')")
    browser.wait("document.querySelector('#trace .done')")
    assert browser.run("document.querySelectorAll('#trace button.chip').length") > 2
    browser.click("#trace button.chip[value='2']")
    done = "document.querySelectorAll('#panel tbody tr').length == 6 && !document.querySelector('#panel [role=alert]')"
    browser.wait(done)
    assert browser.run("document.querySelector('#panel img').naturalWidth") > 300
    assert browser.run("document.querySelector('#panel').innerText").startswith("Span 2")

    browser.resize(390, 844)
    time.sleep(0.3)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    browser.resize(1200, 900)

    browser.write("#question textarea", "")
    browser.click("#ask")
    browser.wait("document.querySelector('#trace').innerText.includes('question is empty')")
    for name, message in (("broken.png", "no image that can be read"), ("wide.png", "megapixels")):
        browser.choose_files("input[type=file]", uploads / name)
        browser.wait(f"document.querySelector('#picture').innerText.includes({message!r})")
    browser.choose_files("input[type=file]", uploads / "red.png")
    browser.wait("document.querySelector('#picture img')")
    browser.write("#question textarea", QUESTION)
    browser.click("#ask")
    browser.wait("document.querySelector('#trace .done')")
    browser.click("#trace button.chip[value='1']")
    browser.wait(done)
    assert MIRRORED in browser.run("document.querySelector('#panel').innerText")

    assert not browser.complaints
    browser.run("console.error('would be seen')")
    assert len(browser.complaints) == 1
    assert all(request.startswith((url, "data:", "blob:")) for request in browser.requests)
