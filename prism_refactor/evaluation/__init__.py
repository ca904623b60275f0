"""Measure a refactored model: perplexity and cost at every k and budget, pages and plots."""
