"""`ilvr serve`, asked by the client of the package `openai`."""

import base64
import io
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn
from helpers import make_image
from openai import APIStatusError, OpenAI

from ilvr.evaluation import answer_batch
from ilvr_commands.main import main
from ilvr_commands.serve_chat import build_app


TOKENS = 24  # of an answer: words, spans, words


def url_of(image, kind="png") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(client, url, question="Plan", **options):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    settings = {"model": "tiny", "max_tokens": TOKENS, "temperature": 0, **options}
    return client.chat.completions.create(messages=[{"role": "user", "content": content}], **settings)


def own_answer(model, processor, image, question="Plan", tokens=TOKENS) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    sample = {"messages": [{"role": "user", "content": content}], "images": [image]}
    return answer_batch(model, processor, [sample], max_new_tokens=tokens)[0].text


@pytest.fixture
def client(model, processor):
    """A client of a server in a thread; the model says two words and a span in turn."""
    start, _, end = processor.latent_token_ids
    right, down = processor.tokenizer(" Right Down", add_special_tokens=False)["input_ids"][-2:]
    turns = [[start], [end, right], [right, down], [down, start]]
    model.generation_config.sequence_bias = [[turn, 9.0 if turn == [start] else 30.0] for turn in turns]
    server = uvicorn.Server(uvicorn.Config(build_app(model, processor, "tiny"), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        port = listener.getsockname()[1]
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        server.should_exit = True
        thread.join()


def test_an_answer_at_once_and_as_a_stream_is_that_of_generate(client, model, processor):
    image = make_image("red")
    expected = own_answer(model, processor, image)
    found = ask(client, url_of(image))
    assert found.choices[0].message.content == expected == "Right DownRight DownRight Down"
    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == TOKENS
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, url_of(image), stream=True)]
    assert "".join(pieces).strip() == expected.strip() and len(pieces) > 3
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_clients_at_the_same_time_get_their_own_answers(client, model, processor):
    asked = [(make_image("red"), "Plan", 12), (make_image("blue", 64), "Plan a path to the goal", 24)]
    expected = [own_answer(model, processor, *own) for own in asked]
    assert expected[0] != expected[1]

    def answer(number):
        image, question, tokens = asked[number % 2]
        return ask(client, url_of(image), question, max_tokens=tokens).choices[0].message.content

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(answer, range(4))] == expected * 2


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,AAAA", "no image that can be read"),
        ("data:image/png;base64,%%%", "image of message 0|base64"),
        (__file__, "no data URL"),
        ("file:///etc/hostname", "no data URL"),
        ("http://127.0.0.1:9/a.png", "started with --fetch_images"),
    ],
)
def test_a_bad_image_is_refused_and_the_server_lives(client, url, message):
    with pytest.raises(APIStatusError, match=message) as error:
        ask(client, url)
    assert error.value.status_code == 400
    assert ask(client, url_of(make_image("red"))).choices[0].message.content


def test_what_is_no_chat_is_refused(client):
    for messages in ([{"content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        with pytest.raises(APIStatusError, match="not in the form of OpenAI's chat"):
            client.chat.completions.create(model="tiny", messages=messages)
    with pytest.raises(APIStatusError, match="pinned to 'tiny'"):
        ask(client, url_of(make_image("red")), model="another")
    with pytest.raises(APIStatusError, match="404"):  # what unloads the model
        client.post("/../reset", cast_to=object)


def test_a_stream_that_is_left_stops_generating(client, model):
    steps = []
    hook = model.model.core.register_forward_hook(lambda *_: steps.append(time.sleep(0.01)))
    with ask(client, url_of(make_image("red")), max_tokens=400, stream=True) as stream:
        next(iter(stream))
    assert ask(client, url_of(make_image("red"))).choices[0].message.content  # waits for its turn
    hook.remove()
    assert len(steps) < 200


def test_the_command(model, processor, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path), "--port", port]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("ilvr serve: [Errno")
    code = "import sys; from ilvr_commands.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(tmp_path), "--served_model_name", "tiny", "--port", port]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        line = next(line for line in server.stderr if "serves tiny" in line)
        client = OpenAI(base_url=line.split()[0], api_key="none", max_retries=0, timeout=60)
        assert ask(client, url_of(make_image("red"))).choices[0].message.content
        server.send_signal(signal.SIGINT)
        rest = server.stderr.read()
        assert server.wait(timeout=60) == 0 and "Traceback" not in rest


def test_without_the_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "ilvr_commands.serve", raising=False)
    assert main(["serve", "nowhere"]) == 2
    assert capsys.readouterr().err == (
        "ilvr serve: uvicorn is not installed. Add the extra `serve`: pip install 'ilvr[serve]'.\n"
    )
