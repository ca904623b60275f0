"""Measure a refactored model: perplexity and cost at every k, non-uniform k, pages and plots."""
