"""Refactor Mixture-of-Experts checkpoints into sub-experts, and run them at any number of active sub-experts."""
