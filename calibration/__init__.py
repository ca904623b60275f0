"""Calibration text -> token rows -> layer-by-layer streaming -> per-expert statistics."""

from calibration.profile import DTYPES, Calibration, Profile
from calibration.statistics import INPUT_SAMPLE, OBSERVED, TOKEN_FLOOR, LayerCollector, LayerStatistics
from calibration.store import INDEX, LayerSummary, Statistics, estimated_bytes, merge_statistics, write_statistics
from calibration.stream import LayerStream
from calibration.text import CALIBRATION_TEXT, EVALUATION_TEXT, Source, load_tokenizer, token_rows

__all__ = [
    "CALIBRATION_TEXT",
    "DTYPES",
    "EVALUATION_TEXT",
    "INDEX",
    "INPUT_SAMPLE",
    "OBSERVED",
    "TOKEN_FLOOR",
    "Calibration",
    "LayerCollector",
    "LayerStatistics",
    "LayerStream",
    "LayerSummary",
    "Profile",
    "Source",
    "Statistics",
    "estimated_bytes",
    "load_tokenizer",
    "merge_statistics",
    "token_rows",
    "write_statistics",
]
