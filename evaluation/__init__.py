"""Evaluation: metrics, answers of a model, controls of its latents, reports of checkpoints, pictures of latents."""

from .audit_results import Audit, ModelAudit, Verdict
from .auditing import audit, audit_model
from .checkpoints import evaluate_checkpoints, score_table
from .controls import CONTROLS, follow_donors, run_controls
from .difficulty_ladder import DifficultyLadder, join_levels
from .generation import Answer, answer_batch, answer_with_latents, generate_answers
from .metrics import Score, load_metric, score_each, scores_by_group
from .pictures import draw_answers, draw_curves, draw_latents, patch_similarity
from .question_files import load_questions
from .questions import Questions
from .records import Evaluator, Record, Run
from .swap_gap import SwapGapCallback
from .view import show_latents


__all__ = [
    "CONTROLS",
    "Answer",
    "Audit",
    "DifficultyLadder",
    "Evaluator",
    "ModelAudit",
    "Questions",
    "Record",
    "Run",
    "Score",
    "SwapGapCallback",
    "Verdict",
    "answer_batch",
    "answer_with_latents",
    "audit",
    "audit_model",
    "draw_answers",
    "draw_curves",
    "draw_latents",
    "evaluate_checkpoints",
    "follow_donors",
    "generate_answers",
    "load_metric",
    "join_levels",
    "load_questions",
    "patch_similarity",
    "run_controls",
    "score_each",
    "score_table",
    "scores_by_group",
    "show_latents",
]
