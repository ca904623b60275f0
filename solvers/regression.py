"""Ridge regression on plain arrays, in float64 and on one core, so that equal numbers give equal bytes in any process."""

from collections.abc import Iterator

import numpy as np
from scipy.linalg import eigh
from threadpoolctl import threadpool_limits

# Ridge strengths tried, as shares of the features' mean variance.
STRENGTHS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 1e1, 1e2)
CHUNK = 2048


def ridge(x: np.ndarray, y: np.ndarray, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression with an intercept; one strength for all targets, by generalised cross-validation (Golub, Heath, Wahba 1979).

    Costs the eigenvectors of the smaller of the two Gram matrices: [D, D] of the features or [n, n] of the observations.

    Args:
        x: float32 [T, D] features; may be a memory map.
        y: float32 [n, M] targets.
        rows: int64 [n], which rows of `x` are the observations; None for all.

    Returns:
        weight float32 [M, D], bias float32 [M].

    Raises:
        LinAlgError: a feature or a target is not finite.
    """
    rows = np.arange(len(x)) if rows is None else rows
    # What is not finite is an error of its own, below, and no warning.
    with threadpool_limits(1), np.errstate(invalid="ignore", over="ignore"):
        mean = sum(part.sum(0) for part in _centred(x, rows)) / len(rows)
        y_mean = y.mean(0, dtype=np.float64)
        target = y - y_mean
        if not np.isfinite(mean).all() or not np.isfinite(target).all():
            raise np.linalg.LinAlgError("not finite")
        values, vectors = _principal_axes(x, rows, mean)
        xy = sum(part.T @ some for part, some in zip(_centred(x, rows, mean), _chunks(target), strict=True))
        rotated = vectors.T @ xy
        shrunk = _shrunk(values, rotated, target, x.shape[1])
        weight = (vectors @ (rotated / shrunk[:, None])).T
        return weight.astype(np.float32), (y_mean - weight @ mean).astype(np.float32)


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), CHUNK):
        yield array[start : start + CHUNK]


def _centred(x: np.ndarray, rows: np.ndarray, mean: np.ndarray | float = 0.0) -> Iterator[np.ndarray]:
    """Some rows of `x` about `mean`, in float64, a chunk at a time."""
    for chosen in _chunks(rows):
        yield x[chosen].astype(np.float64) - mean


def _principal_axes(x: np.ndarray, rows: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [r] of the scatter matrix X^T X of the centred rows and their eigenvectors [D, r], without its null space if n <= D."""
    if len(rows) > x.shape[1]:
        scatter = sum(part.T @ part for part in _centred(x, rows, mean))
        values, vectors = eigh(scatter, overwrite_a=True, driver="evd")
        return values.clip(0), vectors
    observed = np.concatenate(list(_centred(x, rows, mean)))
    values, combinations = eigh(observed @ observed.T, overwrite_a=True, driver="evd")
    some = values > 1e-12 * max(values[-1], 1e-300)
    return values[some], observed.T @ (combinations[:, some] / np.sqrt(values[some]))


def _shrunk(values: np.ndarray, rotated: np.ndarray, target: np.ndarray, features: int) -> np.ndarray:
    """Eigenvalues plus the ridge strength whose generalised cross-validation score is least; the strongest if none has freedom left."""
    total = np.square(target).sum(0)
    best, least = None, np.inf
    for strength in STRENGTHS:
        shrunk = values + strength * max(values.sum() / features, 1e-12)
        explained = (np.square(rotated) * ((2 * shrunk - values) / np.square(shrunk))[:, None]).sum(0)
        freedom = len(target) - 1 - (values / shrunk).sum()
        score = (total - explained).clip(0).sum() / freedom**2 if freedom > 0 else np.inf
        if best is None or score < least or (strength == STRENGTHS[-1] and np.isinf(least)):
            best, least = shrunk, score
    assert best is not None
    return best
