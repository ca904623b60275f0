"""The offline engine: plan a run, refactor a checkpoint, verify the result."""

from refactoring.gate import QualityGate
from refactoring.pipeline import refactor
from refactoring.plan import (
    Plan,
    Splits,
    check_memory,
    make_plan,
    memory_needed,
    partition_seconds,
    possible_splits,
    profile_seconds,
)
from refactoring.recipe import ROUTERS, SALIENCIES, Recipe
from refactoring.timings import Timings
from refactoring.verify import KL_TOLERANCE, LOGIT_TOLERANCE, Comparison, compare_files, compare_logits, compare_tensors, open_refactored
from refactoring.workers import ENGINES, Workers

__all__ = [
    "ENGINES",
    "KL_TOLERANCE",
    "LOGIT_TOLERANCE",
    "ROUTERS",
    "SALIENCIES",
    "Comparison",
    "Plan",
    "QualityGate",
    "Recipe",
    "Splits",
    "Timings",
    "Workers",
    "check_memory",
    "compare_files",
    "compare_logits",
    "compare_tensors",
    "make_plan",
    "memory_needed",
    "open_refactored",
    "partition_seconds",
    "possible_splits",
    "profile_seconds",
    "refactor",
]
