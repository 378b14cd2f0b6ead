"""Evaluation: metrics, answers of a model, reports of checkpoints, pictures of latents."""

from .checkpoints import evaluate_checkpoints, score_table
from .generation import answer_with_latents, generate_answers
from .metrics import Score, load_metric, score_each, scores_by_group
from .pictures import draw_curves, draw_latents, patch_similarity


__all__ = [
    "Score",
    "answer_with_latents",
    "draw_curves",
    "draw_latents",
    "evaluate_checkpoints",
    "generate_answers",
    "load_metric",
    "patch_similarity",
    "score_each",
    "score_table",
    "scores_by_group",
]
