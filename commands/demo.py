"""`ilvr demo MODEL`: a page on which one span of latents can be looked into, and replaced."""

import os
import sys
from argparse import Namespace

from ilvr.evaluation import Questions
from ilvr.evaluation.auditing import load_checkpoint

from .demo_asking import Demo
from .questions import model_kwargs, task_of


def run(options: Namespace) -> int:
    """Serves the page until it is interrupted."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from .demo_page import serve

    questions = Questions.of_task(task_of(options), samples=options.examples) if options.task else None
    model, processor = load_checkpoint(options.model, **model_kwargs(options))
    demo = Demo(model, processor, questions, max_new_tokens=options.max_new_tokens)
    page, url = serve(demo, host=options.host, port=options.port, share=options.share)
    print(f"{url} shows the page; Ctrl-C ends it.", file=sys.stderr)
    page.block_thread()
    return 0
