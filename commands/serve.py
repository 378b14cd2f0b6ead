"""`ilvr serve MODEL`: chat with images over HTTP, in OpenAI's protocol. The server is that of `transformers serve`."""

import socket
import sys
from argparse import Namespace
from contextlib import suppress

import uvicorn

from ilvr.evaluation.auditing import load_checkpoint

from .questions import model_kwargs
from .serve_chat import build_app


def run(options: Namespace) -> int:
    """Serves the model until it is interrupted."""
    model, processor = load_checkpoint(options.model, **model_kwargs(options))
    name = options.served_model_name or options.model
    app = build_app(model, processor, name, fetch_images=options.fetch_images, allow_cors=options.cors)
    with socket.create_server((options.host, options.port)) as listener:  # an error in one line if it is taken
        host, port = listener.getsockname()[:2]
        print(f"http://{host}:{port}/v1 serves {name}; Ctrl-C ends it.", file=sys.stderr, flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        with suppress(KeyboardInterrupt):  # which uvicorn sends on, or not, when it has shut down
            server.run(sockets=[listener])
    return 0
