"""Latent spans inside `generate`: which vector goes into the next step, and what is returned.

The decoding loop is that of transformers; only hooks that it calls are overridden. What travels from step to step is a
[`SpanState`] on the cache, so that it is reordered and returned with it.

B batch (times beams), T sequence, K latents a span, D hidden, V vocabulary.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode

from .latent_attention import AttentionSeat
from .latent_cache import CACHE
from .latent_decoding import (
    CONTINUOUS_BATCHING,
    Intervention,
    LatentControl,
    LatentSpanLogitsProcessor,
    check_decoding,
    latents_at_end,
)
from .latent_spans import SpanState


# A checker cannot know what the mixin comes before: `GenerationMixin`, of a model.
_Mixin: Any = object


class LatentGenerationMixin(_Mixin):
    """Overrides of `GenerationMixin` hooks; a class lists it before `GenerationMixin`."""

    def generate(
        self,
        *args: Any,
        output_latents: bool = False,
        latent_intervention: Intervention | None = None,
        jacobi_iterations: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates words and latent spans. As [`~transformers.GenerationMixin.generate`], and:

        Args:
            output_latents (`bool`, *optional*, defaults to `False`):
                Whether to return the latents; needs `return_dict_in_generate=True`.
            latent_intervention (`Callable`, *optional*):
                Replaces latents before they are used: called as `latent_intervention(latents, span, index)` with
                `latents` (B, D), `span` (B,) the number of the span in its row and `index` (B,) that of the latent in
                its span, both from 0; returns (B, D). Rows outside a span are ignored.
            jacobi_iterations (`int`, *optional*):
                Computes the latents of a span at once, by this many forwards that each refine all of them and one more
                that keeps them, in place of one forward a latent; K - 1 iterations are exact. Saves time where all
                rows of a batch enter their spans together, as one row does. Needs a cache that can be cropped.

        Returns:
            As `generate`. With `output_latents`, the output has a field `latents`: a list with a tensor of shape
            `(spans, K, D)` for each returned sequence, of the spans generated in full. A span that the prompt has
            begun is completed, and is not among them.

        Raises:
            ValueError: for a prompt padded on the right, for ways of decoding that cannot have latents (assisted,
                prompt lookup, guidance, continuous batching), and where latents are asked for without a cache or
                without `return_dict_in_generate=True`, or at once with hidden states or attentions of all layers.
        """
        control = None
        if output_latents or latent_intervention is not None or jacobi_iterations is not None:
            history = {} if output_latents else None
            control = kwargs["latent_control"] = LatentControl(latent_intervention, history, jacobi_iterations)
        caches = [kwargs.get(name) for name in (CACHE, "past_key_values")]
        try:
            outputs = super().generate(*args, **kwargs)
            caches.append(getattr(outputs, CACHE, None))
        finally:
            for cache in caches:
                SpanState.drop_ahead(cache)  # it may have stopped within a span
        if output_latents:
            outputs.latents = self._collect_latents(outputs, control.history)
        return outputs

    def generate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Refused: continuous batching."""
        raise ValueError(CONTINUOUS_BATCHING)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Refused: continuous batching."""
        raise ValueError(CONTINUOUS_BATCHING)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        # The first hook that sees the settings as they hold, whether from a config, the model's own or a keyword.
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        check_decoding(generation_config)
        control = model_kwargs.get("latent_control")
        if control is not None:
            control.check(generation_config)
        if generation_config.use_cache and self.training and self.is_activation_checkpointing:
            raise ValueError(
                "Gradient checkpointing in train mode drops the cache, and with it the latents. Call model.eval() "
                "before generate, or pass use_cache=False."
            )
        return generation_config, model_kwargs

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: GenerationConfig, generation_mode_kwargs: dict
    ) -> None:
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if assisted or generation_mode_kwargs.get("assistant_model") is not None:
            raise ValueError(
                "Assisted decoding drafts words and cannot draft latents. Remove assistant_model, "
                "prompt_lookup_num_tokens and assistant_early_exit."
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        mask, control = model_kwargs.get("attention_mask"), model_kwargs.get("latent_control")
        if mask is not None and mask.ndim == 2 and not (last := mask[:, -1].bool()).all():
            raise ValueError(
                f"The prompts of rows {(~last).nonzero().flatten().tolist()} end in padding, so that their answers "
                'would start behind it. Pad with padding_side="left".'
            )
        if name == "input_ids" and control is not None and control.jacobi_iterations is not None:
            started = latents_at_end(inputs, self.config.latent_pad_token_id, self.config.latent_size)
            half = (started > 0) & (started < self.config.latent_size)
            if half.any():
                raise ValueError(
                    f"The prompts of rows {half.nonzero().flatten().tolist()} end within a latent span, and "
                    "jacobi_iterations computes whole spans. Leave it out, or end the prompt before the span."
                )
        return inputs, name, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        latent_control: LatentControl | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs, cache = super().prepare_inputs_for_generation(input_ids, **kwargs), kwargs.get(CACHE)
        is_step = inputs["input_ids"] is not None and inputs["input_ids"].shape[1] == 1
        if kwargs.get("token_type_ids") is not None and not is_step:
            inputs["token_type_ids"] = kwargs["token_type_ids"]  # counted from the first column, also of a later chunk
        if cache is None or not is_step:
            return inputs
        state = SpanState.of(cache)
        if cache.is_compileable:
            state.take_out_of_graph()
        if latent_control is not None:
            self._control_step(inputs, input_ids, state, latent_control)
        return inputs

    def _control_step(
        self, inputs: dict[str, Any], input_ids: torch.Tensor, state: SpanState, latent_control: LatentControl
    ) -> None:
        """Replaces, computes ahead and notes the vector that a latent in this step is, in `state`."""
        if state.feedback is None:
            return
        size, input_ids = self.config.latent_size, input_ids.to(state.feedback.device)  # `generate` takes ids on a CPU
        index = latents_at_end(input_ids, self.config.latent_pad_token_id, size) - 1  # (B,)
        span = (input_ids == self.config.latent_start_token_id).sum(1) - 1  # (B,)
        in_span = index >= 0
        if latent_control.jacobi_iterations is not None:
            starts = index == 0
            if starts.any():
                self._plan_span(inputs, state, starts, span, latent_control)
            if state.plan is not None:
                planned = state.plan[torch.arange(len(state.plan), device=index.device), index.clamp(min=0)]
                state.feedback = torch.where(in_span.unsqueeze(1), planned, state.feedback)
        else:
            state.feedback = self._intervene(latent_control, state.feedback, in_span, span, index)
        if latent_control.history is not None:
            latent_control.history[input_ids.shape[1] - 1] = state.feedback

    def _intervene(
        self,
        control: LatentControl,
        latents: torch.Tensor,
        rows: torch.Tensor,
        span: torch.Tensor,
        index: torch.Tensor,
    ) -> torch.Tensor:
        """`latents` (B, D), number `index` of `span` in their rows, with what the intervention makes of `rows`."""
        if control.intervention is None:
            return latents
        changed = control.intervention(latents, span, index)
        return torch.where(rows.unsqueeze(1), changed.to(latents), latents)

    def _plan_span(
        self,
        inputs: dict[str, Any],
        state: SpanState,
        starts: torch.Tensor,
        span: torch.Tensor,
        control: LatentControl,
    ) -> None:
        """Computes the latents of the spans that the rows `starts` (B,) enter, by Jacobi iteration over K columns."""
        cache, size = inputs[CACHE], self.config.latent_size
        if cache.is_compileable or not cache.is_croppable:
            raise ValueError(
                f"jacobi_iterations computes columns again, which a {type(cache).__name__} of this model does not "
                "allow. Use a dynamic cache with attention layers alone, or leave jacobi_iterations out."
            )
        cache.activate_past_recording()  # sliding windows are cropped, too
        input_ids = inputs["input_ids"].expand(-1, size)
        embeds = self.get_input_embeddings()(input_ids)  # of `<|latent_pad|>`, in `starts`
        rule = inputs.get("attention_rule"), inputs.get("attention_rule_rows")
        seat = AttentionSeat.of(self.model.vlm, self.config, input_ids, state, *rule)
        forward = self._span_forward(inputs, seat, size, embeds.dtype)

        def intervene(latents: torch.Tensor) -> torch.Tensor:
            columns = [
                self._intervene(control, latents[:, i], starts, span, torch.full_like(span, i))
                for i in range(latents.shape[1])
            ]
            return torch.stack(columns, dim=1)

        first = state.feedback.unsqueeze(1)
        latents = intervene(torch.cat([first, embeds[:, 1:].to(first.dtype)], dim=1))
        for _ in range(control.jacobi_iterations if size > 1 else 0):
            hidden = forward(latents[:, :-1])
            cache.crop(1 - size)
            latents = intervene(torch.cat([first, self.model.latent_head(hidden)], dim=1))
        state.plan = latents if state.plan is None else torch.where(starts.view(-1, 1, 1), latents, state.plan)
        if starts.all():
            state.ahead = forward(latents)
            state.grow(size, seat.columns)

    def _span_forward(
        self, inputs: dict[str, Any], seat: AttentionSeat, size: int, dtype: torch.dtype
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The backbone on the columns of a span that comes next, from latents to last hidden states (B, columns, D).

        Args:
            inputs (`dict`): of the step that enters the span.
            seat (`AttentionSeat`): decides what its columns see.
            size (`int`): K.
            dtype (`torch.dtype`): of input embeddings.
        """
        cache, mask = inputs[CACHE], inputs.get("attention_mask")
        offsets = torch.arange(size, device=inputs["position_ids"].device)

        def forward(latents: torch.Tensor) -> torch.Tensor:
            length, latents = latents.shape[1], latents.to(dtype)
            grown = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), length - 1)], dim=1)
            return self.model.core(
                inputs_embeds=latents,
                attention_mask=seat.mask(latents, grown, cache),
                position_ids=inputs["position_ids"][..., -1:] + offsets[:length],
                use_cache=True,
                **{CACHE: cache},
            ).last_hidden_state

        return forward

    def _collect_latents(self, outputs: Any, history: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """Sorts the recorded vectors by returned row and span: a list of (spans, K, D)."""
        sequences, size = outputs.sequences, self.config.latent_size
        beam_indices = getattr(outputs, "beam_indices", None)
        hidden_size = self.config.get_text_config().hidden_size
        latents = []
        for row, ids in enumerate(sequences):
            is_latent = (ids == self.config.latent_pad_token_id).tolist()
            found = []
            for first in range(len(ids) - size + 1):
                span = range(first, first + size)
                starts = is_latent[first] and not (first and is_latent[first - 1])
                if not starts or not all(is_latent[column] and column in history for column in span):
                    continue  # no span, one of the prompt or begun there, or one that was cut off
                for column in span:
                    # The step that produced the next column had this latent as input, in the beam that went on.
                    next_column = column + 1 - len(ids)
                    source = row if beam_indices is None else int(beam_indices[row, next_column])
                    found.append(history[column][source])
            empty = torch.zeros(0, size, hidden_size, device=ids.device)
            latents.append(torch.stack(found).view(-1, size, hidden_size) if found else empty)
        return latents

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        config = self.config
        placeholders = tuple(i for i in (config.image_token_id, config.video_token_id) if i is not None)
        spans = LatentSpanLogitsProcessor(
            config.latent_start_token_id,
            config.latent_pad_token_id,
            config.latent_end_token_id,
            config.latent_size,
            placeholders,
            check=prefix_allowed_tokens_fn is not None,
        )
        # The last of the caller's own processors: it has the last word on what may come, and the warpers of sampling
        # (top_p, min_p, …) come after it. They would else keep ids that are forbidden, and of a row nothing.
        return super()._get_logits_processor(
            generation_config=generation_config,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            logits_processor=LogitsProcessorList([*(logits_processor or []), spans]),
            **kwargs,
        )

    def _reorder_cache(self, cache: Cache, beam_idx: torch.Tensor) -> Cache:
        cache.reorder_cache(beam_idx)
        SpanState.of(cache).reorder(beam_idx)
        return cache

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        backbone_inputs = inspect.signature(self.model.vlm.forward).parameters
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in backbone_inputs})

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        return self.model.vlm._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
