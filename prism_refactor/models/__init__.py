"""Checkpoints and models: read one lazily, load one layer of it, split its experts, route its sub-experts."""
