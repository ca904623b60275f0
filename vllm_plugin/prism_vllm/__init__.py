"""A plugin of vLLM: the two-level router of the checkpoints that prism-refactor writes, with a k or a budget per request.

Where it is installed, `vllm serve OUT_DIR` uses it. `PRISM_VLLM=0` switches it off.

    k of a request      SamplingParams(extra_args={"prism_k": 6}), over HTTP "vllm_xargs": {"prism_k": 6}
    a budget            "prism_budget": 0.25 in the same place: a quarter of the sub-experts on average, each token what it needs
    a quality           "prism_quality": 0.97 in the same place: the least k that is as good, by evaluation.json
    the default         --additional-config '{"prism_k": 6}' or '{"prism_budget": 0.25}'
    a static k          --hf-overrides '{"num_experts_per_tok": 6}', which is also the most that a request may ask for

Modules: `routing` is the arithmetic, `checkpoint` reads files, `serving` decides k, `engine` changes vLLM, `olmoe` repairs one model class.
"""

import os

_registered = False


def register() -> None:
    """Install the plugin; vLLM calls it in each of its processes, in some more than once.

    A release of vLLM that is not known stops a refactored checkpoint, and nothing else.
    """
    global _registered  # noqa: PLW0603
    if _registered or os.environ.get("PRISM_VLLM") == "0":
        return
    _registered = True
    from prism_vllm import engine

    problem = engine.mismatch()
    engine.install_checks(problem)
    if problem is None:
        engine.install_routing()
        engine.install_runners()
        engine.install_requests()
        engine.install_repairs()
