"""The offline engine: plan a run, refactor a checkpoint, verify the result."""

from refactoring.pipeline import refactor
from refactoring.plan import Plan, gib, make_plan
from refactoring.recipe import ROUTERS, SALIENCIES, Recipe

__all__ = ["ROUTERS", "SALIENCIES", "Plan", "Recipe", "gib", "make_plan", "refactor"]
