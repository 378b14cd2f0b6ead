"""Processor of an ILVR model: the backbone's processing of images and text, and latent spans in the template."""

import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from jinja2 import TemplateError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import cached_file
from transformers.utils.chat_template_utils import render_jinja_template

from .backbone_loading import add_latent_tokens, check_reference_ids, resolve_latent_size
from .configuration_ilvr import LATENT_TOKENS


# One template for all chat formats. An image in an assistant turn is a helper image and renders as a span of K pads.
# The markers around the assistant's words tell the trainer where the loss is.
CHAT_TEMPLATE = """\
{%- macro words(content) %}
{%- if content is string %}{{ SPACE + content }}{% else %}
{%- if content and content[0].type != 'image' %}{{ SPACE }}{% endif %}
{%- for part in content %}
{%- if part.type == 'image' %}{{ caller() }}{% elif part.type == 'text' %}{{ part.text }}{% endif %}
{%- endfor %}
{%- endif %}
{%- endmacro %}
{%- for message in messages %}
{%- if loop.first %}{{ BEGIN + ('' if message.role == 'system' else DEFAULT_SYSTEM) }}{% endif %}
{{- HEADERS[message.role] }}
{%- if message.role == 'assistant' %}
{%- generation %}
{%- call words(message.content) %}
{{- '<|latent_start|>' + '<|latent_pad|>' * LATENT_SIZE + '<|latent_end|>' }}
{%- endcall %}
{{- END }}
{%- endgeneration %}
{%- else %}
{%- call words(message.content) %}{{ IMAGE }}{% endcall %}
{{- END }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ HEADERS.assistant }}{% endif %}
"""


def _chat_format(headers: list[str], image: str, end: str, begin: str = "", space: str = "", default_system: str = ""):
    roles = ("system", "user", "assistant")
    return {
        "HEADERS": dict(zip(roles, headers)),
        "IMAGE": image,
        "END": end,
        "BEGIN": begin,
        "SPACE": space,  # between a header and a text, where no image stands in between
        "DEFAULT_SYSTEM": default_system,
    }


CHATML_HEADERS = [f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")]
COLON_HEADERS = ["System:", "User:", "Assistant:"]
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
GEMMA_HEADERS = ["<start_of_turn>user\n", "<start_of_turn>user\n", "<start_of_turn>model\n"]
CHAT_FORMATS = {
    "Qwen3-VL": _chat_format(CHATML_HEADERS, VISION, "<|im_end|>"),
    "Qwen2.5-VL": _chat_format(CHATML_HEADERS, VISION, "<|im_end|>", default_system=QWEN_SYSTEM),
    "SmolVLM": _chat_format(COLON_HEADERS, "<image>", "<end_of_utterance>", begin="<|im_start|>", space=" "),
    "Idefics3": _chat_format(COLON_HEADERS, "<image>", "<end_of_utterance>", begin="<|begin_of_text|>", space=" "),
    "InternVL": _chat_format(CHATML_HEADERS, "<IMG_CONTEXT>\n", "<|im_end|>"),
    "Gemma 3": _chat_format(GEMMA_HEADERS, "<start_of_image>", "<end_of_turn>", begin="<bos>"),
}
ROLES = ("system", "user", "assistant")
PROBE = (
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A board."}]},
    {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
)


class ILVRProcessor(ProcessorMixin):
    r"""
    Processes images and conversations for [`ILVRForConditionalGeneration`].

    Args:
        image_processor ([`~transformers.BaseImageProcessor`]): the backbone's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the backbone's, with the latent tokens.
        chat_template (`str`, *optional*): renders an image of an assistant turn as a latent span.
        latent_size (`int`, *optional*, defaults to 8): K, the number of `<|latent_pad|>` in a span.
        backbone_processor (`dict`, *optional*): `processor_class` of the backbone and its further arguments.

    Raises:
        ValueError: if the tokenizer has no latent tokens, or `backbone_processor` names no processor.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        latent_size: int = 8,
        backbone_processor: dict[str, Any] | None = None,
    ) -> None:
        missing = [token for token in LATENT_TOKENS if token not in tokenizer.get_added_vocab()]
        if missing:
            raise ValueError(
                f"The tokenizer has no {', '.join(missing)}. Start from a plain backbone with "
                "`ILVRProcessor.from_backbone`, or use the tokenizer that was saved with the checkpoint."
            )
        self.latent_size = latent_size
        self.backbone_processor = backbone_processor or {"processor_class": "Qwen2_5_VLProcessor"}
        arguments = dict(self.backbone_processor)
        name = arguments.pop("processor_class")
        processor_class = getattr(transformers, name, None)
        if not (isinstance(processor_class, type) and issubclass(processor_class, ProcessorMixin)):
            raise ValueError(f"`backbone_processor` names {name!r}, which is no processor of transformers.")
        if "video_processor" in inspect.signature(processor_class.__init__).parameters:
            arguments["video_processor"] = None
        self._backbone = _image_only(processor_class)(image_processor, tokenizer, **arguments)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __reduce__(self):
        # `_backbone` is of a class that no module holds, and is made again from the parts.
        parts = (self.image_processor, self.tokenizer, self.chat_template, self.latent_size, self.backbone_processor)
        return type(self), parts

    def __copy__(self) -> "ILVRProcessor":
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    @classmethod
    def from_backbone(
        cls, name_or_path: str, *, latent_size: int | None = None, chat_template: str | None = None, **kwargs: Any
    ) -> "ILVRProcessor":
        """Starts from the tokenizer and image processor of a plain vision-language checkpoint.

        Args:
            name_or_path (`str`): Hub id or folder of the backbone.
            latent_size (`int`, *optional*, defaults to 8, or that of a reference checkpoint): K.
            chat_template (`str`, *optional*): needed if the backbone's own is none that is known here; must render
                images of assistant turns as latent spans and mark the assistant's words with `{% generation %}`.
            kwargs: passed to `AutoTokenizer.from_pretrained` and `AutoImageProcessor.from_pretrained`.

        Raises:
            ValueError: if the backbone has no processor in transformers or its chat format is not known.
        """
        config = AutoConfig.from_pretrained(name_or_path, **kwargs)
        if config.model_type not in PROCESSOR_MAPPING_NAMES:
            raise ValueError(f"{name_or_path} ({config.model_type}) is not a vision-language model of transformers.")
        # What is generated follows the prompt. The trainer pads by itself.
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **{"padding_side": "left", **kwargs})
        image_processor = AutoImageProcessor.from_pretrained(name_or_path, **kwargs)
        latent_size = resolve_latent_size(config, latent_size)
        check_reference_ids(config, add_latent_tokens(tokenizer))
        processor_class = PROCESSOR_MAPPING_NAMES[config.model_type]
        if chat_template is None:
            chat_template = _template_with_spans(_backbone_chat_template(name_or_path, tokenizer, kwargs), latent_size)
        saved, _ = ProcessorMixin.get_processor_dict(name_or_path, **kwargs)
        accepted = inspect.signature(getattr(transformers, processor_class).__init__).parameters
        settings = {
            k: v for k, v in saved.items() if k in accepted and not isinstance(v, dict) and k != "chat_template"
        }
        backbone_processor = {"processor_class": processor_class, **settings}
        processor = cls(image_processor, tokenizer, chat_template, latent_size, backbone_processor)
        processor.check_chat_template()
        return processor

    def check_chat_template(self) -> None:
        """Renders a probe and counts what the trainer relies on.

        Raises:
            ValueError: if a helper image does not become one span of `latent_size` latents, or the assistant's words
                are not marked by `{% generation %}`.
        """
        probe = (PROBE[0], {"role": "assistant", "content": [{"type": "text", "text": "A"}, {"type": "image"}]})
        (text,), (marks,) = render_jinja_template(
            conversations=[list(probe)],
            chat_template=self.chat_template or "",
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        found, expected = [text.count(token) for token in LATENT_TOKENS], [1, self.latent_size, 1]
        if found != expected:
            raise ValueError(
                f"The chat template renders a helper image as {found} start, pad and end tokens; with "
                f"latent_size={self.latent_size} it must be {expected}."
            )
        if not any("A" in text[start:stop] for start, stop in marks):
            raise ValueError(
                "The chat template does not mark the assistant's words: put {% generation %} and {% endgeneration %} "
                "around them, or nothing is learned."
            )

    @property
    def image_token(self) -> str:
        return self._backbone.image_token

    @property
    def image_token_id(self) -> int:
        return self._backbone.image_token_id

    @property
    def placeholder_id(self) -> int:
        """Id of the token that stands once for each feature of an image, after expansion."""
        return self._backbone.image_token_ids[0]

    @property
    def latent_token_ids(self) -> tuple[int, int, int]:
        """Ids of `<|latent_start|>`, `<|latent_pad|>` and `<|latent_end|>`."""
        start, pad, end = self.tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))
        return start, pad, end

    @property
    def model_input_names(self) -> list[str]:
        return self._backbone.model_input_names

    def create_mm_token_type_ids(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        return self._backbone.create_mm_token_type_ids(*args, **kwargs)

    def _get_num_multimodal_tokens(self, *args: Any, **kwargs: Any):
        return self._backbone._get_num_multimodal_tokens(*args, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any):
        """The backbone's processing: image placeholders in `text` are expanded, images become pixel values."""
        return self._backbone(images=images, text=text, **kwargs)

    def apply_chat_template(self, conversation: list, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.ProcessorMixin.apply_chat_template`]; an assistant's image becomes a latent span.

        The pixels of such a helper image are not model inputs and are left out.

        Raises:
            ValueError: if a turn is none that can be rendered, or its text holds one of the latent tokens: spans come
                from images, not from text.
        """
        is_batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if is_batched else [conversation]
        checked = [[_checked_message(message) for message in messages] for messages in conversations]
        return super().apply_chat_template(checked if is_batched else checked[0], *args, **kwargs)


@cache
def _image_only(processor_class: type) -> type:
    """The backbone's processor class without its video processor, which needs torchvision."""
    attributes = {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])}
    return type(processor_class.__name__, (processor_class,), attributes)


def _checked_message(message: dict) -> dict:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"Unknown role {role!r}. Use one of {', '.join(ROLES)}.")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise ValueError(f"The content of the {role} turn must be a text or a list of parts, got {content!r:.80}.")
    parts, joined = [], ""
    for part in content:
        kind, text = part.get("type"), part.get("text")
        if kind not in ("text", "image") or (kind == "text" and not isinstance(text, str)):
            raise ValueError(f"A part of the {role} turn must be a text with its words or an image, got {part!r:.80}.")
        joined = "" if kind == "image" else joined + text  # parts are rendered without a break
        found = [token for token in LATENT_TOKENS if token in joined]
        if found:
            raise ValueError(
                f"The {role} text {joined[:80]!r} holds {found[0]}. Latent tokens are made from images in assistant "
                "turns; remove them from the text."
            )
        is_helper = role == "assistant" and kind == "image"
        parts.append({"type": "image"} if is_helper else part)
    return {**message, "content": parts}


def _backbone_chat_template(name_or_path: str, tokenizer: Any, kwargs: dict) -> str:
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    file = cached_file(name_or_path, "chat_template.jinja", _raise_exceptions_for_missing_entries=False, **kwargs)
    return "" if file is None else Path(file).read_text(encoding="utf-8")


def _template_with_spans(backbone_template: str, latent_size: int) -> str:
    """Our template in the format whose rendering of a probe is the backbone's own."""
    try:
        expected = _render_probe(backbone_template, bos_token="<bos>")
    except TemplateError:
        expected = None  # the backbone's template does not know such messages
    for chat_format in CHAT_FORMATS.values():
        settings = {**chat_format, "LATENT_SIZE": latent_size}
        header = "".join(f"{{%- set {name} = {json.dumps(value)} %}}\n" for name, value in settings.items())
        if _render_probe(header + CHAT_TEMPLATE) == expected:
            return header + CHAT_TEMPLATE
    raise ValueError(
        f"The backbone's chat template is none of those known here ({', '.join(CHAT_FORMATS)}), so how a latent span "
        "is rendered is not known. Pass chat_template=, with images of assistant turns "
        "rendered as <|latent_start|>, latent_size times <|latent_pad|> and <|latent_end|>, and {% generation %} "
        "around the assistant's words."
    )


def _render_probe(template: str, **kwargs: Any) -> list[str]:
    prompts = [{"conversations": [PROBE], "add_generation_prompt": True}, {"conversations": [PROBE[:2]]}]
    return [render_jinja_template(**prompt, chat_template=template, **kwargs)[0] for prompt in prompts]
