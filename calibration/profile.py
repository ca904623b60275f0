"""The neuron activation profiler: calibration text through the checkpoint, statistics out, one MoE layer after the other."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.statistics import OBSERVED, LayerCollector, LayerStatistics
from prism_refactor.errors import UsageError
from prism_refactor.events import Events
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.layered import dtype_name
from prism_refactor.models.modeling_prism import moe_block
from prism_refactor.models.stream import LayerStream
from prism_refactor.models.transformers_models import run_experts_with


class Profile:
    """The statistics of each MoE layer in order, made while they are iterated: a layer is freed before its statistics are yielded.

    Args:
        checkpoint: the model.
        calibration: how to run.
        rows: int64 [S, T] token ids, from `Calibration.rows`.
        events: told of the sequences that have passed a layer.
        shard: run only part I of M of the rows, given as (I, M) with I from 1; see `merge_statistics`. Shards end where batches do, so
            that each number comes out of the same products as in one run over all rows.

    Raises:
        UsageError: there are fewer batches than shards.
        InputError: (while iterated) activations are not finite.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Calibration,
        rows: torch.Tensor,
        events: Events | None = None,
        shard: tuple[int, int] = (1, 1),
    ):
        self.checkpoint, self.calibration, self.rows, self.shard = checkpoint, calibration, rows, shard
        self.events = events or Events()
        number, shards = shard
        batches = -(-len(rows) // calibration.batch_size)
        if batches < shards:
            raise UsageError(
                f"`shard` {number}/{shards}: the text has {batches} batches of {calibration.batch_size} samples; use fewer shards"
            )
        first, last = (batches * part // shards * calibration.batch_size for part in (number - 1, number))
        self._part = slice(first, min(last, len(rows)))
        self._position = self._first = 0
        self._hidden: torch.Tensor | None = None

    def __iter__(self) -> Iterator[LayerStatistics]:
        stream = LayerStream(self.checkpoint, self.rows[self._part], self.calibration.compute(self.checkpoint))
        run_experts_with(stream.model, OBSERVED)
        if self._hidden is not None:
            stream.hidden.copy_(self._hidden)
        self._hidden = stream.hidden
        for index in range(self._position, len(stream)):
            statistics = self._profile_layer(stream, index)
            self._position = index + 1
            if statistics is not None and index >= self._first:
                yield statistics
            # Not kept while the next layer runs.
            del statistics

    @property
    def recorded(self) -> dict[str, Any]:
        """The calibration, for a manifest."""
        return self.calibration.recorded(self.rows)

    def origin(self) -> str:
        """Where the statistics come from, as far as it decides their bytes and `Calibration.recorded` does not say it."""
        dtype = dtype_name(self.calibration.resolved_dtype(self.checkpoint))
        text = hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()[:16]
        return f"profiled in {dtype} on {self.calibration.resolved_device()}, text {text}"

    def state(self) -> dict[str, torch.Tensor]:
        """Where the text is: its hidden states [S, T, H] and how many layers they have passed.

        Empty before the first layer, and where layers carry more than hidden states: then the text passes the finished layers again.
        """
        if self.checkpoint.architecture.carried:
            return {}
        return {} if self._hidden is None else {"hidden": self._hidden, "position": torch.tensor([self._position])}

    def restore(self, state: dict[str, torch.Tensor], first: int) -> None:
        """Go on from a `state` of a run over the same text, with layer `first`."""
        self._first = first
        if state:
            self._hidden, self._position = state["hidden"], int(state["position"])

    def _profile_layer(self, stream: LayerStream, index: int) -> LayerStatistics | None:
        calibration, total = self.calibration, len(stream.hidden)
        with stream.layer(index) as layer:
            found = moe_block(layer)
            collector = None
            if found is not None:
                length = self.rows.shape[1]
                collector = LayerCollector(
                    index,
                    found[1].experts,
                    len(self.rows) * length,
                    calibration.tokens_per_expert,
                    calibration.seed,
                    self._part.start * length,
                )
                found[1].experts.prism_collector = collector
            stream.advance(index, lambda done: self.events.progress("rows profiled", done, total, (index, len(stream))))
            if found is None or collector is None:
                return None
            del found[1].experts.prism_collector
            return collector.finish()
