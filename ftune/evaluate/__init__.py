"""Generation and scoring: the same prompts, decoding and scorer for the base, the few-shot base and the tuned model."""

from ftune.evaluate.function import FunctionMetric
from ftune.evaluate.generation import generate, generate_ids
from ftune.evaluate.losses import (
    TOKEN_METRICS,
    TokenLosses,
    fall_interval,
    mean_loss_interval,
    token_losses,
    token_score,
)
from ftune.evaluate.metrics import METRICS, exact_match
from ftune.evaluate.previous import Previous
from ftune.evaluate.prompts import choose_shots, expected, has_answer, prompt_ids, prompt_text, question
from ftune.evaluate.scoring import Scored, Scorer, details, sample_rows, score

__all__ = [
    "METRICS",
    "TOKEN_METRICS",
    "FunctionMetric",
    "Previous",
    "Scored",
    "Scorer",
    "TokenLosses",
    "choose_shots",
    "details",
    "exact_match",
    "expected",
    "fall_interval",
    "generate",
    "generate_ids",
    "has_answer",
    "mean_loss_interval",
    "prompt_ids",
    "prompt_text",
    "question",
    "sample_rows",
    "score",
    "token_losses",
    "token_score",
]
