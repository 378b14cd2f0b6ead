"""ILVR: a vision-language model that thinks in words and in short spans of continuous latent vectors.

The model is a composition over any image-text-to-text backbone of transformers. Shapes: B batch, T sequence, S spans,
K latents a span, D hidden, V vocabulary.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .backbone_loading import add_token_rows, check_weights, without_local_path
from .configuration_ilvr import ILVRConfig, latent_token_ids
from .latent_cache import ChunkCache, checkpointing_with_cache
from .latent_generation import LatentGenerationMixin
from .latent_rollout import SlicedForward, gather_spans, roll_out, roll_out_in_parallel, scatter_spans


@dataclass
class ILVRModelOutput(ModelOutput):
    """
    Output of [`ILVRModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, D)`): after the final norm.
        past_key_values (`Cache`, *optional*): with `latent_feedback` (B, D), the vector that a latent in the next
            column would be.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): of each layer.
        attentions (`tuple[torch.FloatTensor]`, *optional*): of each layer; not returned by the cached walk.
        predicted_latents (`torch.FloatTensor` of shape `(B, S, K, D)`, *optional*): what the model predicts at each
            latent position, `latent_head(h_{t-1})`.
        latent_inputs (`torch.FloatTensor` of shape `(B, S, K, D)`, *optional*): the input embeddings that the latent
            positions were given.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    predicted_latents: torch.FloatTensor | None = None
    latent_inputs: torch.FloatTensor | None = None


@dataclass
class ILVROutput(ModelOutput):
    """
    Output of [`ILVRForConditionalGeneration`]: as [`ILVRModelOutput`], with

    Args:
        loss (`torch.FloatTensor`, *optional*): cross-entropy over the labels.
        logits (`torch.FloatTensor` of shape `(B, T, V)`): scores of the next token.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    predicted_latents: torch.FloatTensor | None = None
    latent_inputs: torch.FloatTensor | None = None


class ILVRLatentHead(nn.Module):
    """Map from the last hidden state to the next latent, (…, D) to (…, D). The paper feeds the state back as it is."""

    def __init__(self, kind: str, hidden_size: int):
        super().__init__()
        if kind == "identity":
            self.layers = nn.Identity()
        elif kind == "linear":
            self.layers = nn.Linear(hidden_size, hidden_size)
        else:
            self.layers = nn.Sequential(
                nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
            )

    def forward(self, hidden_states):
        return self.layers(hidden_states)


class ILVRPreTrainedModel(PreTrainedModel):
    config_class = ILVRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    input_modalities = ("image", "video", "text")


class ILVRModel(ILVRPreTrainedModel):
    """The backbone with latent spans, without the language-model head's logits."""

    def __init__(self, config: ILVRConfig):
        super().__init__(config)
        try:
            self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        except ValueError as error:
            raise ValueError(
                f"{type(config.vlm_config).__name__} is not an image-text-to-text backbone that transformers knows; "
                "ILVR needs one, such as Qwen2.5-VL, Qwen3-VL or SmolVLM."
            ) from error
        self.latent_head = ILVRLatentHead(config.latent_head, config.get_text_config().hidden_size)
        self.post_init()

    @property
    def core(self) -> PreTrainedModel:
        """The backbone without its language-model head."""
        return self.vlm.base_model

    def get_input_embeddings(self):
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.vlm.set_input_embeddings(value)

    @property
    def get_image_features(self):
        # A property, so that the signature that `generate` inspects is the backbone's own.
        return self.core.get_image_features

    @property
    def get_video_features(self):
        return self.core.get_video_features

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict | None = None,
        latent_values: torch.FloatTensor | None = None,
        latent_mask: torch.BoolTensor | None = None,
        jacobi_iterations: int | None = None,
        jacobi_gradient_iterations: int | None = None,
        min_chunks: int | None = None,
        **kwargs,
    ) -> ILVRModelOutput:
        """Runs the backbone and fills the latent positions of `input_ids`.

        Without latent ids this is the backbone's own forward. With them, the latents are `latent_values` where given
        (teacher forcing, one forward), else the model's own feedback: one after the other (one cached walk, gradients
        exact), or all at once by `jacobi_iterations`.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): ids, with K `<|latent_pad|>` a span.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding, wherever it is.
            mm_encoder_outputs (`dict`, *optional*): image features computed before, `{"image": output of
                get_image_features}`, in place of `pixel_values`.
            latent_values (`torch.FloatTensor` of shape `(B, S, K, D)`, *optional*): latents to put in.
            latent_mask (`torch.BoolTensor` of shape `(B, S, K)`, *optional*, defaults to all): which of them are put
                in; the other positions keep the embedding of `<|latent_pad|>`.
            jacobi_iterations (`int`, *optional*): computes the latents by this many forwards that each refine all of
                them (Jacobi iteration, arXiv 2506.18582), in place of one forward a latent. Exact from S * K - 1
                iterations on; `predicted_latents` are what one more would give, and tell how far the others are.
            jacobi_gradient_iterations (`int`, *optional*, defaults to all): through how many of the last iterations
                the gradient flows; with 0 the latents are constants.
            min_chunks (`int`, *optional*): lengthens the walk by forwards of no effect up to this many. The ranks of a
                model that is sharded have to run equally many, since each gathers weights from all.
            kwargs: further inputs of the backbone (`pixel_values`, `image_grid_thw`, `mm_token_type_ids`, …).

        Raises:
            ValueError: if `latent_values` has another K than the config, a sequence starts inside a span, or the
                numbers of iterations are out of range.
        """
        inputs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "mm_encoder_outputs": mm_encoder_outputs,
            **kwargs,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        pads = None if input_ids is None else input_ids == self.config.latent_pad_token_id
        feedback = getattr(past_key_values, "latent_feedback", None)
        ahead = getattr(past_key_values, "columns_ahead", None)
        if ahead is not None and ahead.shape[1]:
            # A step of generation whose column was computed with the first of its span.
            past_key_values.columns_ahead = ahead[:, 1:]
            outputs = ILVRModelOutput(last_hidden_state=ahead[:, :1], past_key_values=past_key_values)
        elif pads is not None and feedback is not None and pads.shape[1] == 1:
            # A step of generation: no look at the values, so that nothing waits for the device.
            embeds = self.get_input_embeddings()(input_ids)
            embeds = torch.where(pads.unsqueeze(-1), feedback.unsqueeze(1).to(embeds.dtype), embeds)
            outputs = self.core(inputs_embeds=embeds, **inputs)
        elif pads is None or not (min_chunks or pads.any()):
            outputs = self.core(input_ids=input_ids, inputs_embeds=inputs_embeds, **inputs)
            if self.training and self.config.latent_head != "identity":
                # A rank whose batch has no span gives its latent head a gradient too, of zero, or DDP would wait.
                hidden = outputs.last_hidden_state
                outputs.last_hidden_state = hidden + 0 * self.latent_head(hidden[:, -1:])
        else:
            inputs = self._encode(input_ids, inputs)
            if latent_values is not None:
                return self._forced(input_ids, pads, latent_values, latent_mask, **inputs)
            if jacobi_iterations is not None:
                return self._jacobi(input_ids, pads, jacobi_iterations, jacobi_gradient_iterations, **inputs)
            return self._rollout(input_ids, pads, min_chunks or 0, **inputs)
        return self._with_feedback(outputs)

    def _with_feedback(self, outputs, **latents) -> ILVRModelOutput:
        hidden, cache = outputs.last_hidden_state, outputs.past_key_values
        if cache is not None:
            # A copy: a view would keep the hidden states of the whole prompt alive.
            cache.latent_feedback = self.latent_head(hidden[:, -1]).clone()
        return ILVRModelOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **latents,
        )

    def _encode(self, input_ids, inputs) -> dict:
        """Computes positions and image features once, since the walk calls the backbone with slices of a sequence."""
        inputs = dict(inputs)
        if "attention_mask" not in inputs:
            past = inputs["past_key_values"].get_seq_length() if "past_key_values" in inputs else 0
            inputs["attention_mask"] = input_ids.new_ones(input_ids.shape[0], past + input_ids.shape[1])
        if "position_ids" not in inputs:
            # Backbones with M-RoPE give images text positions, silently, unless they are told where the images are.
            inputs.setdefault("mm_token_type_ids", self._modalities(input_ids))
            position_ids = self.vlm._prepare_position_ids_for_generation(input_ids, inputs)
            inputs["position_ids"] = position_ids[..., -input_ids.shape[1] :]
        inputs.pop("mm_token_type_ids", None)
        if "token_type_ids" in inspect.signature(self.core.forward).parameters:
            # Gemma 3: an image's tokens see each other in both directions.
            inputs.setdefault("token_type_ids", self._modalities(input_ids))
        return self.vlm._prepare_multimodal_encoder_kwargs_for_generation(inputs)

    def _placeholders(self, input_ids) -> dict:
        """Where the placeholders of images and videos stand, (B, T) each; a backbone may know no videos."""
        ids = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        return {modality: torch.eq(input_ids, -1 if i is None else i) for modality, i in ids.items()}

    def _modalities(self, input_ids) -> torch.IntTensor:
        placeholders = self._placeholders(input_ids)
        return placeholders["image"].int() + 2 * placeholders["video"].int()

    def _forced(self, input_ids, pads, latent_values, latent_mask, **inputs) -> ILVRModelOutput:
        batch_size, num_spans, size, hidden_size = latent_values.shape
        if size != self.config.latent_size:
            raise ValueError(
                f"latent_values holds {size} latents a span; the model's latent_size is {self.config.latent_size}."
            )
        if latent_mask is None:
            latent_mask = torch.ones(latent_values.shape[:3], dtype=torch.bool, device=latent_values.device)
        embeds = scatter_spans(self.get_input_embeddings()(input_ids), pads, latent_values, latent_mask)
        outputs = self.core(inputs_embeds=embeds, **inputs)
        before = outputs.last_hidden_state.roll(1, dims=1)  # h_{t-1} in column t
        return self._with_feedback(
            outputs,
            predicted_latents=self.latent_head(gather_spans(before, pads, num_spans, size)),
            latent_inputs=gather_spans(embeds, pads, num_spans, size),
        )

    def _rollout(self, input_ids, pads, min_chunks, past_key_values=None, use_cache=None, **inputs):
        keep_cache = past_key_values is not None
        cache = past_key_values if keep_cache else ChunkCache.of_size(self.config.get_text_config(), pads.shape[1])
        embeds = self.get_input_embeddings()(input_ids)
        with checkpointing_with_cache(self.core) as layers:
            past = cache.get_seq_length()
            forward = SlicedForward(self.core, layers, self._placeholders(input_ids), past=past, **inputs)
            pieces, fed = roll_out(
                forward, self.latent_head, embeds, pads, cache, keep_cache=keep_cache, min_chunks=min_chunks
            )
        outputs = _join(pieces, past_key_values)
        latents = self._gather(fed, pads)
        return self._with_feedback(outputs, predicted_latents=latents, latent_inputs=latents)

    def _jacobi(
        self, input_ids, pads, iterations, gradient_iterations, past_key_values=None, use_cache=None, **inputs
    ):
        if past_key_values is not None:
            raise ValueError("jacobi_iterations computes whole sequences. Leave past_key_values out.")
        gradient_iterations = iterations if gradient_iterations is None else gradient_iterations
        if iterations < 1 or not 0 <= gradient_iterations <= iterations:
            raise ValueError(
                "`jacobi_iterations` must be at least 1 and `jacobi_gradient_iterations` between 0 and that, got "
                f"{iterations} and {gradient_iterations}."
            )
        cache = ChunkCache.concatenating(self.config.get_text_config())
        embeds = self.get_input_embeddings()(input_ids)
        with checkpointing_with_cache(self.core) as layers:
            forward = SlicedForward(self.core, layers, self._placeholders(input_ids), **inputs)
            pieces, fed = roll_out_in_parallel(
                forward,
                self.latent_head,
                embeds,
                pads,
                cache,
                iterations=iterations,
                gradient_iterations=gradient_iterations,
            )
        outputs = _join(pieces)
        before = outputs.last_hidden_state.roll(1, dims=1)  # h_{t-1} in column t
        latents = {
            "predicted_latents": self.latent_head(self._gather(before, pads)),
            "latent_inputs": self._gather(fed, pads),
        }
        return self._with_feedback(outputs, **latents)

    def _gather(self, values, pads):
        num_spans = -(-int(pads.sum(1).max()) // self.config.latent_size)
        return gather_spans(values, pads, num_spans, self.config.latent_size)


def _join(pieces: list, past_key_values=None):
    """Outputs of the backbone for a whole sequence."""
    outputs = pieces[-1]
    outputs.last_hidden_state = torch.cat([piece.last_hidden_state for piece in pieces], dim=1)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(torch.cat(layer, dim=1) for layer in zip(*(p.hidden_states for p in pieces)))
    outputs.past_key_values, outputs.attentions = past_key_values, None
    return outputs


class ILVRForConditionalGeneration(LatentGenerationMixin, ILVRPreTrainedModel, GenerationMixin):
    """A vision-language model that reasons in words and latent visual spans (arXiv 2512.05665)."""

    accepts_loss_kwargs = True

    def __init__(self, config: ILVRConfig):
        super().__init__(config)
        self.model = ILVRModel(config)
        self.generation_config = self.model.vlm.generation_config
        self.post_init()

    @classmethod
    def from_backbone(
        cls, name_or_path: str, *, latent_size: int | None = None, latent_head: str = "identity", **kwargs
    ) -> "ILVRForConditionalGeneration":
        """Starts an ILVR model from a plain vision-language checkpoint.

        Adds the three latent tokens (the ids that [`ILVRProcessor.from_backbone`] gives them) and, where the
        vocabulary has no spare rows, resizes the embeddings. A checkpoint of the paper's reference code, recognised by
        `latent_token_id` in its config, keeps its ids and its latent size.

        Args:
            name_or_path (`str`): Hub id or folder of the backbone.
            latent_size (`int`, *optional*, defaults to 8, or that of a reference checkpoint): K.
            latent_head (`str`, *optional*, defaults to `"identity"`): see [`ILVRConfig`].
            kwargs: passed to `AutoModelForImageTextToText.from_pretrained`.

        Raises:
            ValueError: if the checkpoint is no image-text-to-text model, is an ILVR model already, was trained with
                another `latent_size`, or holds other weights than its config asks for.
        """
        hub_kwargs = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}
        vlm_config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
        if vlm_config.model_type == ILVRConfig.model_type:
            raise ValueError(f"{name_or_path} is an ILVR checkpoint already: load it with from_pretrained.")
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub_kwargs)
        start_id, pad_id, end_id, latent_size = latent_token_ids(vlm_config, tokenizer, latent_size)
        vlm_config = without_local_path(vlm_config)
        config = ILVRConfig(
            vlm_config=vlm_config,
            latent_size=latent_size,
            latent_head=latent_head,
            latent_start_token_id=start_id,
            latent_pad_token_id=pad_id,
            latent_end_token_id=end_id,
        )
        with torch.device("meta"):
            model = cls(config)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported all at once, below
        vlm, report = AutoModelForImageTextToText.from_pretrained(name_or_path, **kwargs)
        check_weights(name_or_path, report)
        if not hasattr(vlm_config, "latent_token_id"):
            add_token_rows(vlm, [start_id, pad_id, end_id])
        vlm.config = without_local_path(vlm.config)
        model.name_or_path = vlm.config._name_or_path  # PEFT notes it as an adapter's base
        model.config.vlm_config = vlm.config
        model.model.vlm = vlm
        model.model.latent_head.to_empty(device=vlm.device)
        model.model.latent_head.apply(model._init_weights)
        model.model.latent_head.to(vlm.dtype)
        model.generation_config = vlm.generation_config
        model.tie_weights()
        return model.eval()

    def save_pretrained(self, save_directory, save_original_format: bool = False, **kwargs):
        """As [`~transformers.PreTrainedModel.save_pretrained`], with the names that the weights have in the model.

        The "original format" of a backbone is its oldest layout on the Hub. `Trainer` resumes with a plain
        `load_state_dict`, which would skip the renamed weights with no more than a warning.
        """
        # `register_for_auto_class` remembers one auto class; `AutoModel` finds the same class.
        name = type(self).__name__
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": f"modeling_ilvr.{name}"}
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)

    @property
    def vlm(self) -> PreTrainedModel:
        """The backbone."""
        return self.model.vlm

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.vlm.set_output_embeddings(value)

    def get_image_features(self, *args, **kwargs):
        return self.model.get_image_features(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict | None = None,
        latent_values: torch.FloatTensor | None = None,
        latent_mask: torch.BoolTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ILVROutput:
        """As [`ILVRModel.forward`], with logits and loss.

        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): ids to predict, -100 where there is no loss.
            logits_to_keep (`int` or `torch.LongTensor`, *optional*, defaults to 0): the last columns, or the columns,
                to compute logits for; 0 is all. `labels` need all.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): what the loss is divided by, for accumulation.

        Example:

        ```python
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> model = AutoModelForImageTextToText.from_pretrained(repo_id, trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained(repo_id, trust_remote_code=True)
        >>> inputs = processor.apply_chat_template(
        ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ... )
        >>> print(processor.batch_decode(model.generate(**inputs, max_new_tokens=128)))
        ```
        """
        kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            latent_values=latent_values,
            latent_mask=latent_mask,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.get_text_config().vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return ILVROutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            predicted_latents=outputs.predicted_latents,
            latent_inputs=outputs.latent_inputs,
        )
