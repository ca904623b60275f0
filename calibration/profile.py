"""The neuron activation profiler: calibration text through the checkpoint, statistics out, one MoE layer after the other."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from prism_refactor.calibration.statistics import OBSERVED, LayerCollector, LayerStatistics
from prism_refactor.calibration.text import CALIBRATION_TEXT, load_tokenizer, token_rows
from prism_refactor.errors import UsageError
from prism_refactor.models.architectures import moe_block
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.layered import check_device, dtype_name
from prism_refactor.models.stream import LayerStream

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_LENGTH = 512
OnProgress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What text runs through the model, and how.

    An empty `datasets` means the bundled text; no `max_seq_length` means 512 or what the model takes, if that is less.
    """

    datasets: tuple[str, ...] = ()
    text_column: str = "text"
    num_samples: int = 256
    max_seq_length: int | None = None
    tokens_per_expert: int = 2048
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 8
    seed: int = 0

    def resolved_device(self) -> str:
        """'cpu' or 'cuda'. Raises UsageError when CUDA is asked for and absent."""
        check_device(self.device)
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    def resolved_dtype(self, checkpoint: Checkpoint) -> torch.dtype:
        """The compute type; 'auto' is float32 on a CPU and the checkpoint's own type on a GPU."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        own = getattr(checkpoint.config, "dtype", None)
        return own if self.resolved_device() == "cuda" and isinstance(own, torch.dtype) else torch.float32

    def rows(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The token rows, int64 [S, T]. Raises InputError or UsageError as `token_rows` does."""
        names = list(self.datasets) or [CALIBRATION_TEXT]
        tokenizer = load_tokenizer(checkpoint.path)
        return token_rows(names, tokenizer, self.num_samples, self.sequence_length(checkpoint), self.seed, self.text_column)

    def sequence_length(self, checkpoint: Checkpoint) -> int:
        """Tokens per row. Raises UsageError when the model takes fewer than asked for."""
        limit = getattr(checkpoint.config, "max_position_embeddings", None)
        if self.max_seq_length is None:
            return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
        if limit and self.max_seq_length > limit:
            raise UsageError(f"--max-seq-length {self.max_seq_length}: the model takes at most {limit} tokens")
        return self.max_seq_length

    def tokens(self, checkpoint: Checkpoint) -> int:
        """Tokens of the text, where there is enough of it."""
        return self.num_samples * self.sequence_length(checkpoint)

    def recorded(self, rows: torch.Tensor) -> dict[str, Any]:
        """What a manifest says about a run over `rows`: the rows there were, which may be fewer or shorter than asked for."""
        counted = {"num_samples": rows.shape[0], "max_seq_length": rows.shape[1]}
        return asdict(self) | {"datasets": list(self.datasets) or ["bundled"]} | counted

    def shortage(self, rows: torch.Tensor) -> str | None:
        """A warning when there was less text than asked for."""
        if len(rows) >= self.num_samples:
            return None
        return f"the text gives {rows.shape[0]} samples of {rows.shape[1]} tokens; {self.num_samples} were asked for"


class Profile:
    """The statistics of each MoE layer in order, made while they are iterated: a layer is freed before its statistics are yielded.

    Args:
        checkpoint: the model.
        calibration: how to run.
        rows: int64 [S, T] token ids, from `Calibration.rows`.
        on_progress: told (layer, rows done, rows in all) after every batch.
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
        on_progress: OnProgress | None = None,
        shard: tuple[int, int] = (1, 1),
    ):
        self.checkpoint, self.calibration, self.rows, self.on_progress = checkpoint, calibration, rows, on_progress
        number, shards = shard
        batches = -(-len(rows) // calibration.batch_size)
        if batches < shards:
            raise UsageError(
                f"--shard {number}/{shards}: the text has {batches} batches of {calibration.batch_size} samples; use fewer shards"
            )
        first, last = (batches * part // shards * calibration.batch_size for part in (number - 1, number))
        self._shard = slice(first, min(last, len(rows)))
        self._position = 0
        self._hidden: torch.Tensor | None = None

    def __iter__(self) -> Iterator[LayerStatistics]:
        calibration = self.calibration
        dtype, device = calibration.resolved_dtype(self.checkpoint), calibration.resolved_device()
        stream = LayerStream(self.checkpoint, self.rows[self._shard], dtype, device, calibration.batch_size)
        stream.model.set_experts_implementation(OBSERVED)
        if self._hidden is not None:
            stream.hidden.copy_(self._hidden)
        self._hidden = stream.hidden
        for index in range(self._position, len(stream)):
            statistics = self._profile_layer(stream, index)
            self._position = index + 1
            if statistics is not None:
                yield statistics
            # Not kept while the next layer runs.
            del statistics

    def origin(self) -> str:
        """Where the statistics come from, as far as it decides their bytes and `Calibration.recorded` does not say it."""
        dtype = dtype_name(self.calibration.resolved_dtype(self.checkpoint))
        text = hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()[:16]
        return f"profiled in {dtype} on {self.calibration.resolved_device()}, text {text}"

    def state(self) -> dict[str, torch.Tensor]:
        """Where the text is: its hidden states [S, T, H] and how many layers they have passed. Empty before the first layer."""
        return {} if self._hidden is None else {"hidden": self._hidden, "position": torch.tensor([self._position])}

    def restore(self, state: dict[str, torch.Tensor], _: int) -> None:
        """Go on from a `state` of a run over the same text."""
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
                    self._shard.start * length,
                )
                found[1].experts.prism_collector = collector
            stream.advance(index, lambda done: self.on_progress(index, done, total) if self.on_progress else None)
            if found is None or collector is None:
                return None
            del found[1].experts.prism_collector
            return collector.finish()
