"""The online half of MoE-Prism: measure, schedule and serve requests of different k with one model."""

from serving.performance import PERFORMANCE_FILE, PerformanceModel, Prediction, Table
from serving.scheduling import SCHEDULERS, Job, Limits, Scheduler

__all__ = ["PERFORMANCE_FILE", "SCHEDULERS", "Job", "Limits", "PerformanceModel", "Prediction", "Scheduler", "Table"]
