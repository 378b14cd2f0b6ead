"""The page of `ilvr demo` in Gradio."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from .demo_asking import MAX_CHARACTERS, MAX_MEGABYTES, Asked, Demo
from .demo_html import CSS, INTRODUCTION


ON_CLICK = """element.addEventListener('click', (event) => {
  const chip = event.target.closest('button.chip');
  if (chip && !chip.disabled) trigger('click', {number: Number(chip.value)});
});"""


def build_page(demo: Demo) -> gr.Blocks:
    """The page, which answers one question at a time, whoever asks."""
    one: dict[str, Any] = {
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "api_visibility": "private",
        "show_progress": "hidden",
    }

    def look(asked: Asked | None, event: gr.EventData) -> Iterator[str]:
        yield from demo.look(asked, int(event.number))

    with gr.Blocks(title="ILVR: look into the latents", analytics_enabled=False) as page:
        subject, asked = gr.State(), gr.State()
        gr.HTML(INTRODUCTION, elem_classes="ilvr")
        with gr.Row():
            with gr.Column(min_width=300):
                examples = demo.examples()
                example = gr.Dropdown(
                    examples, value=0 if examples else None, label="Example", elem_id="example", visible=bool(examples)
                )
                picture = gr.HTML(elem_classes="ilvr", elem_id="picture")
                upload = gr.UploadButton(
                    f"Upload an image (up to {MAX_MEGABYTES} MB)", file_types=["image"], elem_id="upload", size="sm"
                )
            with gr.Column(min_width=300, scale=2):
                question = gr.Textbox(label="Question", lines=3, elem_id="question", max_length=MAX_CHARACTERS)
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                trace = gr.HTML(elem_classes="ilvr", elem_id="trace", js_on_load=ON_CLICK)
        panel = gr.HTML(elem_classes="ilvr", elem_id="panel")
        answer = [trace, asked, panel]
        asking = gr.on([ask.click, question.submit], demo.ask, [subject, question], answer, **one)
        looking = trace.click(look, asked, panel, trigger_mode="always_last", **one)
        stop: dict[str, Any] = {"cancels": [asking, looking], "api_visibility": "private", "show_progress": "hidden"}
        upload.upload(demo.upload, upload, [subject, picture, *answer], **stop)
        if examples:
            chosen = [subject, picture, question, *answer]
            page.load(demo.choose, example, chosen, api_visibility="private", show_progress="hidden")
            example.input(demo.choose, example, chosen, **stop)
    return page


def serve(
    demo: Demo, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False
) -> tuple[gr.Blocks, str]:
    """Starts to serve the page, whose fonts, scripts and styles all come from here.

    Returns:
        `tuple`: the page, and its address.
    """
    page = build_page(demo)
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=f"{MAX_MEGABYTES}mb",
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
    )
    return page, public or local
