"""Run a model whose sub-experts do not fit in memory, from a cache of them."""
