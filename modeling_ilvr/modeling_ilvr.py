"""ILVR: a vision-language model that thinks in words and in short spans of continuous latent vectors.

The model is a composition over any image-text-to-text backbone of transformers. Shapes: B batch, T sequence, S spans,
K latents a span, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput
from transformers.utils.peft_utils import find_adapter_config_file

from .backbone_loading import (
    add_latent_tokens,
    add_token_rows,
    check_reference_ids,
    check_weights,
    load_adapter,
    mean_word_norm,
    resolve_latent_head,
    resolve_latent_size,
    without_local_path,
)
from .configuration_ilvr import ILVRConfig
from .latent_attention import AttentionRule, AttentionSeat
from .latent_cache import CACHE
from .latent_decoding import Intervention
from .latent_filling import fill_by_fixed_point, fill_by_walk, fill_forced, fill_in_parallel
from .latent_generation import LatentGenerationMixin
from .latent_sequences import Sequences, encode_inputs
from .latent_spans import SpanState


@dataclass
class ILVRModelOutput(BaseModelOutputWithPast):
    """
    Output of [`ILVRModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, D)`): after the final norm.
        cache (`Cache`, *optional*): with `latent_spans` ([`SpanState`]), which holds the vector that a latent in the
            next column would be; `past_key_values` up to transformers 5.23.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): of each layer.
        attentions (`tuple[torch.FloatTensor]`, *optional*): of each layer; not returned by the cached walk.
        predicted_latents (`torch.FloatTensor` of shape `(B, S, K, D)`, *optional*): what the model predicts at each
            latent position, `latent_head(h_{t-1})`.
        latent_inputs (`torch.FloatTensor` of shape `(B, S, K, D)`, *optional*): the input embeddings that the latent
            positions were given.
    """

    predicted_latents: torch.FloatTensor | None = None
    latent_inputs: torch.FloatTensor | None = None


@dataclass
class ILVROutput(CausalLMOutputWithPast):
    """
    Output of [`ILVRForConditionalGeneration`]: as [`ILVRModelOutput`], with

    Args:
        loss (`torch.FloatTensor`, *optional*): cross-entropy over the labels.
        logits (`torch.FloatTensor` of shape `(B, T, V)`): scores of the next token.
    """

    predicted_latents: torch.FloatTensor | None = None
    latent_inputs: torch.FloatTensor | None = None


class ILVRLatentHead(nn.Module):
    """Map from the last hidden state to the next latent, (…, D) to (…, D). The paper feeds the state back as it is.

    The alignment loss is a cosine and leaves the norm of a latent free: a student that was fed image features would
    else be fed vectors of another size at inference. `"rescale"` gives each latent the norm `config.latent_norm`.
    """

    def __init__(self, config: ILVRConfig) -> None:
        super().__init__()
        self.config, kind = config, config.latent_head
        hidden_size = config.get_text_config().hidden_size
        if kind in ("identity", "rescale"):
            self.layers = nn.Identity()
        elif kind == "linear":
            self.layers = nn.Linear(hidden_size, hidden_size)
        else:
            self.layers = nn.Sequential(
                nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        latents = self.layers(hidden_states)
        if self.config.latent_head == "rescale":
            latents = (self.config.latent_norm * normalize(latents.float(), dim=-1)).to(latents.dtype)
        return latents


class ILVRPreTrainedModel(PreTrainedModel):
    config_class = ILVRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True  # a step of `generate`
    input_modalities = ("image", "video", "text")


class ForwardCase(StrEnum):
    """What a forward has to do about latents."""

    PLAIN = "plain"  # nothing: there are none
    STEP = "step"  # of a generation: one column, a latent or a word
    STEP_AHEAD = "step ahead"  # of a generation whose column was computed before
    FORCED = "forced"  # put given ones in
    WALK = "walk"  # compute them one after the other
    PARALLEL = "parallel"  # compute them all at once
    FIXED_POINT = "fixed point"  # compute them all at once until they stay


class ILVRModel(ILVRPreTrainedModel):
    """The backbone with latent spans, without the language-model head's logits."""

    def __init__(self, config: ILVRConfig) -> None:
        super().__init__(config)
        try:
            self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        except ValueError as error:
            raise ValueError(
                f"{type(config.vlm_config).__name__} is not an image-text-to-text backbone that transformers knows; "
                "ILVR needs one, such as Qwen2.5-VL, Qwen3-VL or SmolVLM."
            ) from error
        self.latent_head = ILVRLatentHead(config)
        self.post_init()

    @property
    def core(self) -> PreTrainedModel:
        """The backbone without its language-model head."""
        return self.vlm.base_model

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_input_embeddings(value)

    @property
    def get_image_features(self) -> Any:
        # A property, so that the signature that `generate` inspects is the backbone's own.
        return self.core.get_image_features

    @property
    def get_video_features(self) -> Any:
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
        latent_intervention: Intervention | None = None,
        jacobi_iterations: int | None = None,
        jacobi_gradient_iterations: int | None = None,
        fixed_point_tolerance: float | None = None,
        min_chunks: int | None = None,
        attention_rule: AttentionRule | None = None,
        attention_rule_rows: torch.BoolTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> ILVRModelOutput:
        """Runs the backbone and fills the latent positions of `input_ids`.

        Without latent ids this is the backbone's own forward. With them, the latents are `latent_values` where given
        (teacher forcing, one forward), else the model's own feedback: one after the other (one cached walk, gradients
        exact), or all at once by `jacobi_iterations` or up to a `fixed_point_tolerance`.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): ids, with K `<|latent_pad|>` a span.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding, wherever it is.
            mm_encoder_outputs (`dict`, *optional*): image features computed before, `{"image": output of
                get_image_features}`, in place of `pixel_values`.
            latent_values (`torch.FloatTensor` of shape `(B, S, K, D)`, *optional*): latents to put in.
            latent_mask (`torch.BoolTensor` of shape `(B, S, K)`, *optional*, defaults to all): which of them are put
                in; the other positions keep the embedding of `<|latent_pad|>`.
            latent_intervention (`Callable`, *optional*): replaces the model's own latents before they are used, as in
                `generate`: called for each column with latents as `latent_intervention(latents, span, index)`. What it
                returns may depend on the latents of other rows; the gradient flows through it.
            jacobi_iterations (`int`, *optional*): computes the latents by this many forwards that each refine all of
                them (Jacobi iteration, arXiv 2506.18582), in place of one forward a latent. Exact from S * K - 1
                iterations on; `predicted_latents` are what one more would give, and tell how far the others are.
            jacobi_gradient_iterations (`int`, *optional*, defaults to all): through how many of the last iterations
                the gradient flows; with 0 the latents are constants.
            fixed_point_tolerance (`float`, *optional*): computes the latents as the fixed point of one forward: by
                iterations without a graph, until one changes them by less than this, relative, and with the gradient
                of the fixed point, to the same precision. That is the walk's, in fewer and wider forwards.
            min_chunks (`int`, *optional*): lengthens the walk by forwards of no effect up to this many. The ranks of a
                model that is sharded have to run equally many, since each gathers weights from all.
            attention_rule (`Callable`, *optional*): takes pairs of columns away from the attention mask, such as
                [`hide_images_after_first_span`]. A function of the [`ColumnFacts`] of all columns that returns a mask
                function of transformers. Needs `input_ids`, and the attention implementation "sdpa" or "eager".
            attention_rule_rows (`torch.BoolTensor` of shape `(B,)`, *optional*, defaults to all): rows that the rule
                holds for.
            cache (`Cache`, *optional*): of the columns before, named as from transformers 5.24 on; `past_key_values`
                is the same.
            kwargs: further inputs of the backbone (`pixel_values`, `image_grid_thw`, `mm_token_type_ids`, …).

        Raises:
            ValueError: if there are not either ids or embeddings, `latent_values` do not fit, a sequence starts inside
                a span, the numbers of iterations are out of range, a `latent_intervention` is given beside latents
                that are not computed one after the other, or the backbone cannot follow an `attention_rule`.
        """
        given = [latent_values, jacobi_iterations, fixed_point_tolerance]
        if sum(way is not None for way in [*given, latent_intervention]) > 1:
            raise ValueError(
                "Latents are given (latent_values), or computed one after the other, where a latent_intervention may "
                "replace them, or all at once (jacobi_iterations, fixed_point_tolerance). Leave all but one out."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        cache = past_key_values if cache is None else cache
        inputs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: cache,
            "use_cache": use_cache,
            "mm_encoder_outputs": mm_encoder_outputs,
            **kwargs,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        num_columns = (inputs_embeds if input_ids is None else input_ids).shape[1]
        state = SpanState() if cache is None else SpanState.of(cache, num_columns)
        is_latent = None if input_ids is None else input_ids == self.config.latent_pad_token_id
        case = self._case(is_latent, state, given, bool(min_chunks))
        if case is ForwardCase.STEP_AHEAD:
            outputs = ILVRModelOutput(last_hidden_state=state.take_ahead(), **{CACHE: cache})
            return self._with_state(outputs, state)

        seat = AttentionSeat.of(self.vlm, self.config, input_ids, state, attention_rule, attention_rule_rows)
        latents = {}
        if case is ForwardCase.STEP:
            outputs = self._step(input_ids, is_latent, state.feedback, seat, inputs)
        elif case is ForwardCase.PLAIN:
            outputs = self._plain(input_ids, inputs_embeds, seat, inputs)
        else:
            sequences = Sequences.of(self.vlm, self.config, input_ids, seat, inputs)
            parts = self.core, self.latent_head, sequences
            if case is ForwardCase.FORCED:
                outputs, latents = fill_forced(*parts, latent_values, latent_mask)
            elif case is ForwardCase.WALK:
                outputs, latents = fill_by_walk(*parts, min_chunks or 0, state.feedback, latent_intervention)
            elif case is ForwardCase.PARALLEL:
                outputs, latents = fill_in_parallel(*parts, jacobi_iterations, jacobi_gradient_iterations)
            else:
                outputs, latents = fill_by_fixed_point(*parts, fixed_point_tolerance)
        state.grow(num_columns, seat.columns)
        return self._with_state(outputs, state, **latents)

    def _case(
        self, is_latent: torch.BoolTensor | None, state: SpanState, given: list[Any], walked: bool
    ) -> ForwardCase:
        cases = [ForwardCase.FORCED, ForwardCase.PARALLEL, ForwardCase.FIXED_POINT]
        chosen = next((case for case, way in zip(cases, given) if way is not None), ForwardCase.WALK)
        if is_latent is not None and is_latent.shape[1] == 1 and chosen is not ForwardCase.FORCED:
            if state.has_columns_ahead:
                return ForwardCase.STEP_AHEAD
            if state.feedback is not None:
                # No look at the values, so that nothing waits for the device.
                return ForwardCase.STEP
        if is_latent is None or not (walked or is_latent.any()):
            return ForwardCase.PLAIN
        return chosen

    def _with_state(self, outputs: Any, state: SpanState, **latents: torch.Tensor) -> ILVRModelOutput:
        """The outputs of this model, and on their cache what the next column will need."""
        hidden, cache = outputs.last_hidden_state, getattr(outputs, CACHE)
        if cache is not None:
            # A copy: a view would keep the hidden states of the whole prompt alive.
            state.feedback = self.latent_head(hidden[:, -1]).clone()
            cache.latent_spans = state
        return ILVRModelOutput(
            last_hidden_state=hidden,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: cache},
            **latents,
        )

    def _step(
        self,
        input_ids: torch.LongTensor,
        is_latent: torch.BoolTensor,
        feedback: torch.Tensor,
        seat: AttentionSeat,
        inputs: dict[str, Any],
    ) -> Any:
        """One column: `feedback` (B, D) in the rows that are in a span, the embedding of a word in the others."""
        embeds = self.get_input_embeddings()(input_ids)
        embeds = torch.where(is_latent.unsqueeze(-1), feedback.unsqueeze(1).to(embeds.dtype), embeds)
        return self.core(inputs_embeds=embeds, **seat.ruled(inputs, embeds))

    def _plain(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        seat: AttentionSeat,
        inputs: dict[str, Any],
    ) -> Any:
        """The backbone's own forward."""
        if seat.rule is not None:
            # Positions are counted from the 2D mask, before there is one of pairs.
            inputs = self._encode(input_ids, inputs)
            inputs = seat.ruled(inputs, self.get_input_embeddings()(input_ids))
        outputs = self.core(input_ids=input_ids, inputs_embeds=inputs_embeds, **inputs)
        if self.training and any(True for _ in self.latent_head.parameters()):
            # A rank whose batch has no span gives its latent head a gradient too, of zero, or DDP would wait.
            hidden = outputs.last_hidden_state
            outputs.last_hidden_state = hidden + 0 * self.latent_head(hidden[:, -1:])
        return outputs

    def _encode(self, input_ids: torch.LongTensor, inputs: dict[str, Any]) -> dict[str, Any]:
        return encode_inputs(self.vlm, self.config, input_ids, inputs)


class ILVRForConditionalGeneration(LatentGenerationMixin, ILVRPreTrainedModel, GenerationMixin):
    """A vision-language model that reasons in words and latent visual spans (arXiv 2512.05665)."""

    accepts_loss_kwargs = True

    def __init__(self, config: ILVRConfig) -> None:
        super().__init__(config)
        self.model = ILVRModel(config)
        self.generation_config = self.model.vlm.generation_config
        self.post_init()

    @classmethod
    def from_backbone(
        cls, name_or_path: str, *, latent_size: int | None = None, latent_head: str | None = None, **kwargs: Any
    ) -> "ILVRForConditionalGeneration":
        """Starts an ILVR model from a plain vision-language checkpoint.

        Adds the three latent tokens (the ids that [`ILVRProcessor.from_backbone`] gives them) and, where the
        vocabulary has no spare rows, resizes the embeddings. A checkpoint of the paper's reference code, recognised by
        `latent_token_id` in its config, keeps its ids, its latent size and its feedback.

        Under `"rescale"` latents have the mean norm of a word's embedding until stage 1 measures that of its targets;
        on the meta device, where there is none, `latent_norm` stays at the config's default.

        Args:
            name_or_path (`str`): Hub id or folder of the backbone.
            latent_size (`int`, *optional*, defaults to 8, or that of a reference checkpoint): K.
            latent_head (`str`, *optional*, defaults to `"rescale"`, or `"identity"` for a reference checkpoint): see
                [`ILVRConfig`]; `"identity"` is the paper's.
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
        latent_size, ids = resolve_latent_size(vlm_config, latent_size), add_latent_tokens(tokenizer)
        check_reference_ids(vlm_config, ids)
        vlm_config = without_local_path(vlm_config)
        config = ILVRConfig(
            vlm_config=vlm_config,
            latent_size=latent_size,
            latent_head=resolve_latent_head(vlm_config, latent_head),
            latent_start_token_id=ids[0],
            latent_pad_token_id=ids[1],
            latent_end_token_id=ids[2],
        )
        with torch.device("meta"):
            model = cls(config)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported all at once, below
        vlm, report = AutoModelForImageTextToText.from_pretrained(name_or_path, **kwargs)
        check_weights(name_or_path, report)
        if not hasattr(vlm_config, "latent_token_id"):
            add_token_rows(vlm, ids)
        vlm.config = without_local_path(vlm.config)
        model.name_or_path = str(name_or_path)  # PEFT notes it as the base of an adapter, which is nothing without it
        model.config.vlm_config = vlm.config
        model.model.vlm = vlm
        model.model.latent_head.to_empty(device=vlm.device)
        model.model.latent_head.apply(model._init_weights)
        model.model.latent_head.to(vlm.dtype)
        if config.latent_head == "rescale" and vlm.device.type != "meta":
            config.latent_norm = mean_word_norm(vlm)
        model.generation_config = vlm.generation_config
        model.tie_weights()
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.PreTrainedModel.from_pretrained`]; also takes an adapter that [`ILVRTrainer`] has saved.

        Returns:
            The model; a `PeftModel` over its backbone for an adapter, trainable with `is_trainable=True`.

        Raises:
            ValueError: for a plain backbone, and for an adapter that was saved without its ILVR config.
        """
        if "config" not in kwargs and kwargs.get("state_dict") is None and pretrained_model_name_or_path is not None:
            hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}
            adapter = find_adapter_config_file(pretrained_model_name_or_path, **hub)
            if adapter is not None:
                return load_adapter(cls, pretrained_model_name_or_path, adapter, hub, **kwargs)
            saved, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            if saved.get("model_type", ILVRConfig.model_type) != ILVRConfig.model_type:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a plain {saved['model_type']} backbone, not an ILVR model. "
                    "Start from it with `ILVRForConditionalGeneration.from_backbone`."
                )
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, save_original_format: bool = False, **kwargs: Any) -> None:
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

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_output_embeddings(value)

    def get_image_features(self, *args: Any, **kwargs: Any) -> ModelOutput:
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
        latent_intervention: Intervention | None = None,
        jacobi_iterations: int | None = None,
        jacobi_gradient_iterations: int | None = None,
        fixed_point_tolerance: float | None = None,
        min_chunks: int | None = None,
        attention_rule: AttentionRule | None = None,
        attention_rule_rows: torch.BoolTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
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
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            latent_values=latent_values,
            latent_mask=latent_mask,
            latent_intervention=latent_intervention,
            jacobi_iterations=jacobi_iterations,
            jacobi_gradient_iterations=jacobi_gradient_iterations,
            fixed_point_tolerance=fixed_point_tolerance,
            min_chunks=min_chunks,
            attention_rule=attention_rule,
            attention_rule_rows=attention_rule_rows,
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
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            predicted_latents=outputs.predicted_latents,
            latent_inputs=outputs.latent_inputs,
        )
