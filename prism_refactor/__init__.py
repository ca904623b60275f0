"""Refactor Mixture-of-Experts checkpoints into sub-experts, and run them at any number of active sub-experts.

    import prism_refactor

    prism_refactor.refactor("OLMoE-1B-7B", "out")
    model = prism_refactor.load("out", k=16)

Importing this package imports nothing else; torch and transformers come with the first name that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism_refactor.api import attach, evaluate, load, profile, refactor, set_active

    __version__: str

__all__ = ["__version__", "attach", "evaluate", "load", "profile", "refactor", "set_active"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("prism-refactor")
    if name in __all__:
        return getattr(import_module("prism_refactor.api"), name)
    raise AttributeError(f"module 'prism_refactor' has no attribute {name!r}")
