"""Training: one loop for everything, which yields a Step after each optimizer step."""

from ftune.train.gradients import NonFinite, Share, accumulate, is_out_of_memory, seed_step
from ftune.train.job import MICRO_BATCH_TOKENS, Found, Job, TrainingPlan, attending, begin_finding, offloading
from ftune.train.loop import Step, keep_freed_memory, mean_loss, peak_memory, train

__all__ = [
    "MICRO_BATCH_TOKENS",
    "Found",
    "Job",
    "NonFinite",
    "Share",
    "Step",
    "TrainingPlan",
    "accumulate",
    "attending",
    "begin_finding",
    "is_out_of_memory",
    "keep_freed_memory",
    "mean_loss",
    "offloading",
    "peak_memory",
    "seed_step",
    "train",
]
