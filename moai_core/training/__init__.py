"""Training: the loop, optimizers and schedules, resuming, ranks, what a run writes down."""

from moai_core.training.loop import train
from moai_core.training.run import Result
from moai_core.training.stop import StopFlag

__all__ = ["Result", "StopFlag", "train"]
