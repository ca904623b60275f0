"""Which inference engines can run a refactored checkpoint: whether they have a class for its family, and their own limits.

Classes: engines.json, which `benchmarks/engine_classes.py` writes. Limits: `padded_num_experts < 1024` in vLLM's kernel that sorts tokens
by expert, read in 0.30 to 0.33; LLAMA_MAX_EXPERTS of llama.cpp, read as vendored in llama-cpp-python 0.3.36.
"""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_refactor.formats import Source

if TYPE_CHECKING:
    from prism_refactor.refactoring.plan import Plan

CLASSES = Path(__file__).with_name("engines.json")
VLLM_EXPERTS, LLAMA_CPP_EXPERTS = 992, 1024
# The least width of an expert that fills the tiles of GPU kernels.
TILE = 64


@functools.cache
def _classes() -> dict[str, Any]:
    """Of each engine, its `release` and the `model_types` that it has a class for."""
    return dict(json.loads(CLASSES.read_text()))


def engine_notes(sizes: dict[str, int], model: "Source | Plan") -> list[str]:
    """Return a sentence for each engine, and one more where experts are narrow.

    Args:
        sizes: the sizes after refactoring, by config key: number of experts, top-k, width, perhaps others.
        model: what is known of it.

    Example:
        >>> olmoe = Source("name", "fingerprint", "olmoe", {})
        >>> engine_notes({"num_experts": 1024, "num_experts_per_tok": 128, "intermediate_size": 64}, olmoe)[0]
        'vLLM: cannot run it: 1024 sub-experts in a layer, its limit is 992; lower --sub-experts'
    """
    notes, (experts, _, width, *_) = [], sizes.values()
    for engine, most, how, otherwise in (
        (
            "vLLM",
            VLLM_EXPERTS,
            "two-level router with the plugin prism-vllm, else the stock router" if model.plain_router else "the stock router",
            "its Transformers backend may run it",
        ),
        ("llama.cpp", LLAMA_CPP_EXPERTS, "the stock router", "it does not run it"),
    ):
        known = _classes()[engine]
        if not model.stock:
            notes.append(f"{engine}: runs it as the original, if it runs {model.model_type}")
        elif experts > most:
            notes.append(f"{engine}: cannot run it: {experts} sub-experts in a layer, its limit is {most}; lower --sub-experts")
        elif model.inside:
            notes.append(f"{engine}: not tried: a {model.model_type} with a {model.inside} inside; {otherwise}")
        elif model.model_type not in known["model_types"]:
            notes.append(f"{engine}: has no class for {model.model_type} ({known['release']}); {otherwise}")
        else:
            notes.append(f"{engine}: runs it: {how}")
    if width % TILE:
        notes.append(f"GPU kernels: sub-experts of {width} neurons do not fill a tile of {TILE}; fewer --sub-experts waste less")
    return notes
