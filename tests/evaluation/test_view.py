"""The figure of what generated latents resemble: lines and panels, places, what is refused."""

import io

import numpy as np
import pytest
import torch
from helpers import make_image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ilvr.evaluation import show_latents


def ask(*images, words="Plan"):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]


@pytest.fixture
def generate(model, processor):
    """What `generate` returns for conversations; the spans it makes come early."""

    def generate(messages, **settings):
        inputs = processor.apply_chat_template(
            *(messages,),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        bias = [[[processor.latent_token_ids[0]], 6.0]]
        settings = {"output_latents": True, "return_dict_in_generate": True, "sequence_bias": bias, **settings}
        return model.eval().generate(**inputs, do_sample=False, max_new_tokens=16, **settings)

    return generate


@pytest.fixture
def drawn(monkeypatch):
    """Titles and shadings of each axis, in the order of the axes."""
    found = {"titles": [], "shadings": []}
    set_title, imshow = Axes.set_title, Axes.imshow
    monkeypatch.setattr(Axes, "set_title", lambda axis, t, **k: found["titles"].append(t) or set_title(axis, t, **k))

    def record(axis, image, **kwargs):
        if "norm" in kwargs:
            found["shadings"].append(image)
        return imshow(axis, image, **kwargs)

    monkeypatch.setattr(Axes, "imshow", record)
    return found


def test_a_line_for_each_image_of_each_row(model, processor, generate, drawn, tmp_path):
    make_image("green", 64).save(tmp_path / "photo.png")
    two = ask(make_image("red"), str(tmp_path / "photo.png"), words="Compare the two")
    messages = [two, ask(make_image("blue"))]
    output = generate(messages)
    figure = show_latents(model, processor, messages, output, max_spans=2)
    assert isinstance(figure, Figure)
    spans = [min(2, len(latents)) for latents in output.latents]
    assert min(spans) > 0
    assert len(drawn["shadings"]) == 2 * spans[0] + spans[1]
    assert drawn["shadings"][0].shape == (2, 2) and drawn["shadings"][spans[0]].shape == (4, 4)
    starts = [title for title in drawn["titles"] if not title.startswith("span")]
    assert len(starts) == 3 and starts[1] == "image 2"
    with Image.open(io.BytesIO(figure._repr_png_())) as picture:
        assert picture.height > 600  # three lines


def test_each_latent_is_drawn_where_it_is_most_alike(model, processor, generate, drawn):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8))
    messages = ask(image)
    output = generate(messages)
    inputs = processor.image_processor([image], return_tensors="pt")
    features = model.get_image_features(**inputs, return_dict=True).pooler_output[0].detach()  # 2 x 4 tokens
    output.latents = [torch.stack([features[[1, 1, 1]], features[[6, 6, 6]]])]
    figure = show_latents(model, processor, messages, output)
    assert [int(shading.argmax()) for shading in drawn["shadings"]] == [1, 6]
    numbers = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert numbers[1:3] == [["1", "2", "3"]] * 2


def test_spans_over_the_pictures_that_they_mean(model, processor, generate, drawn):
    """As many as there are; further spans over the question's first image, and its second one is left out."""
    messages = ask(make_image("red"), make_image("green"))
    output = generate(messages)
    assert len(output.latents[0]) > 1
    show_latents(model, processor, messages, output, pictures=[("after R", make_image("red", 64))], max_spans=2)
    assert drawn["titles"][1:] == ["after R", "span 2"]
    assert [shading.shape for shading in drawn["shadings"]] == [(4, 4), (2, 2)]


def test_answers_without_spans_have_a_picture_too(model, processor, generate, drawn):
    messages = ask(make_image("red"))
    output = generate(messages, suppress_tokens=[processor.latent_token_ids[0]])
    show_latents(model, processor, messages, output)
    assert len(drawn["titles"]) == 1 and not drawn["shadings"]


def test_what_does_not_belong_together_is_refused(model, processor, generate):
    one, other = ask(make_image("red")), ask(make_image("red"), words="Something else")
    with pytest.raises(ValueError, match="The output has no latents. Call generate with"):
        show_latents(model, processor, one, generate(one, output_latents=False))
    output = generate(one)
    with pytest.raises(ValueError, match="There are 2 conversations, 1 rows in the output and 2 lists"):
        show_latents(model, processor, [one, other], output)
    with pytest.raises(ValueError, match="does not begin with these conversations"):
        show_latents(model, processor, other, output)
    words = [{"role": "user", "content": [{"type": "text", "text": "Plan"}]}]
    with pytest.raises(ValueError, match="Conversation 0 shows no image"):
        show_latents(model, processor, words, generate(words))
