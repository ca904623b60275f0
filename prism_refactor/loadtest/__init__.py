"""Replay requests against a server or against a performance model."""
