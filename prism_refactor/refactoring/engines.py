"""Which inference engines can run a refactored checkpoint, by their own limits.

vLLM: `padded_num_experts < 1024` in its kernel that sorts tokens by expert, read in 0.30 to 0.33. llama.cpp: LLAMA_MAX_EXPERTS, read as
vendored in llama-cpp-python 0.3.36.
"""

VLLM_EXPERTS, LLAMA_CPP_EXPERTS = 992, 1024
# The least width of an expert that fills the tiles of GPU kernels.
TILE = 64


def engine_notes(sizes: dict[str, int]) -> list[str]:
    """Return a sentence for each engine, and one more where experts are narrow.

    Args:
        sizes: the sizes after refactoring, by config key: number of experts, top-k, width, perhaps others.

    Example:
        >>> engine_notes({"num_experts": 1024, "num_experts_per_tok": 128, "intermediate_size": 64})[0]
        'vLLM: cannot run it: 1024 sub-experts in a layer, its limit is 992; lower --sub-experts'
    """
    notes, (experts, _, width, *_) = [], sizes.values()
    for name, most, how in (
        ("vLLM", VLLM_EXPERTS, "two-level router with the plugin prism-vllm, else the stock router"),
        ("llama.cpp", LLAMA_CPP_EXPERTS, "the stock router"),
    ):
        if experts <= most:
            notes.append(f"{name}: runs it: {how}")
        else:
            notes.append(f"{name}: cannot run it: {experts} sub-experts in a layer, its limit is {most}; lower --sub-experts")
    if width % TILE:
        notes.append(f"GPU kernels: sub-experts of {width} neurons do not fill a tile of {TILE}; fewer --sub-experts waste less")
    return notes
