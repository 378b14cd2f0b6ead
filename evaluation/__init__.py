"""Evaluation: metrics, answers of a model, pictures of its latents."""

from .generation import generate_answers, load_metric
from .pictures import draw_curves, draw_latents


__all__ = ["draw_curves", "draw_latents", "generate_answers", "load_metric"]
