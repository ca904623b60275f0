"""Fit the sub-expert router of one layer."""
