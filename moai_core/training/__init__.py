"""Training: the loop, optimizers and schedules, resuming, ranks, what a run writes down."""

from moai_core.training.loop import Result, train
from moai_core.training.stop import StopFlag

__all__ = ["Result", "StopFlag", "train"]
