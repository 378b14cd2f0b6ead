"""The application of `ilvr serve`: that of `transformers serve`, for one model, and for images that are sent.

By itself that one loads no class that is not of transformers, opens whatever file of its machine a request names as an
image, and lets any client load and unload models.
"""

import base64
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseHandler, GenerationState, Modality

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.data.images import image_size, open_image


ROUTES = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health"}
MAX_MEGAPIXELS = 64  # of an image


class OneModel(ModelManager):
    """Knows one model, which is loaded already."""

    def __init__(self, model: ILVRForConditionalGeneration, processor: ILVRProcessor, name: str) -> None:
        self.served = model, processor
        super().__init__(force_model=name)

    def _load_model(self, *args: Any, **kwargs: Any) -> ILVRForConditionalGeneration:
        return self.served[0]

    def _load_processor(self, *args: Any, **kwargs: Any) -> ILVRProcessor:
        return self.served[1]

    def get_model_modality(self, *args: Any, **kwargs: Any) -> Modality:
        return Modality.VLM

    def get_gen_models(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]


class SentImages(BaseHandler):
    """Images come with the request, or from an address where that is allowed; never from a file of this machine."""

    fetch_images = False

    def get_processor_inputs_from_messages(
        self, messages: list[dict[str, Any]], modality: Modality
    ) -> list[dict[str, Any]]:
        try:
            parsed = BaseHandler.get_processor_inputs_from_messages(messages, modality)
        except (AttributeError, KeyError, TypeError) as error:
            detail = f"The messages are not in the form of OpenAI's chat ({type(error).__name__}: {error})."
            raise HTTPException(400, detail) from error
        for number, message in enumerate(parsed):
            for part in message["content"]:
                if part["type"] == "image":
                    self._open(part, f"The image of message {number}")
                elif part["type"] != "text":
                    raise HTTPException(400, f"Message {number} has a part of type {part['type']}: not text or image.")
        return parsed

    def _open(self, part: dict[str, Any], name: str) -> None:
        address = str(part["url"])
        if self.fetch_images and address.startswith(("http://", "https://")):
            return  # the processor loads it
        kind, _, data = address.partition(",")
        if not (kind.startswith("data:image/") and kind.endswith(";base64")):
            fetched = "" if self.fetch_images else " Addresses are loaded by a server started with --fetch_images."
            raise HTTPException(400, f"{name} is no data URL. Send data:image/png;base64,… .{fetched}")
        try:
            image = {"bytes": base64.b64decode(data, validate=True)}
            width, height = image_size(image, name)
            if width * height > MAX_MEGAPIXELS * 1_000_000:
                raise ValueError(f"{name} has {width} x {height} pixels. Shrink it to {MAX_MEGAPIXELS} megapixels.")
            part["image"] = open_image(image, name)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        del part["url"]


class Chat(SentImages, ChatCompletionHandler):
    """`/v1/chat/completions`."""


class Response(SentImages, ResponseHandler):
    """`/v1/responses`."""


def build_app(
    model: ILVRForConditionalGeneration,
    processor: ILVRProcessor,
    name: str,
    *,
    fetch_images: bool = False,
    allow_cors: bool = False,
) -> FastAPI:
    """The application, which answers one request after the other.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        name (`str`): by which requests ask for the model.
        fetch_images (`bool`, *optional*, defaults to `False`): whether images may be http(s) addresses, which this
            machine then asks for.
        allow_cors (`bool`, *optional*, defaults to `False`): whether pages of other sites may send requests.
    """
    manager, state = OneModel(model, processor, name), GenerationState()
    chat, response = Chat(manager, state), Response(manager, state)
    chat.fetch_images = response.fetch_images = fetch_images
    app = build_server(
        manager,
        chat,
        completion_handler=CompletionHandler(manager, state),
        response_handler=response,
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
        enable_cors=allow_cors,
    )
    app.add_exception_handler(HTTPException, _as_openai)
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    return app


async def _as_openai(request: Request, error: Any) -> JSONResponse:
    """An error in the form in which clients look for its message."""
    detail = {"message": error.detail, "type": "invalid_request_error", "code": error.status_code}
    return JSONResponse({"error": detail}, status_code=error.status_code)
