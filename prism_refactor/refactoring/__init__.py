"""Refactor a checkpoint: plan a run, do it, verify the result, fine-tune its router."""
