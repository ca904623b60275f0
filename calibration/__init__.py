"""Calibration: text to token sequences, and what the neurons of every expert did on them."""
