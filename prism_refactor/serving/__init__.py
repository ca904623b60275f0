"""Serve one model to many requests, each at its own k."""
