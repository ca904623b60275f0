"""What text runs through a model, and how. Imports torch only when it is used, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from prism_refactor.errors import UsageError

if TYPE_CHECKING:
    import torch

    from prism_refactor.models.checkpoint import Checkpoint
    from prism_refactor.models.stream import ComputeOptions

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_LENGTH = 512
DEFAULT_SAMPLES, DENSE_SAMPLES = 256, 64


def torch_dtype(name: str) -> torch.dtype | None:
    """Return the type of a name in `DTYPES`; None for 'auto'."""
    import torch  # noqa: PLC0415

    return None if name == "auto" else getattr(torch, name)


@dataclass(frozen=True)
class Calibration:
    """What text runs through the model, and how.

    An empty `datasets` means the bundled text; no `max_seq_length` means 512 or what the model takes, if that is less; no `num_samples`
    means 256, or 64 for a dense model, every token of which reaches its one expert.
    """

    datasets: tuple[str, ...] = ()
    text_column: str = "text"
    num_samples: int | None = None
    max_seq_length: int | None = None
    tokens_per_expert: int = 2048
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 8
    seed: int = 0

    def resolved_device(self) -> str:
        """Return 'cpu' or 'cuda'. Raises UsageError when CUDA is asked for and absent."""
        import torch  # noqa: PLC0415

        from prism_refactor.models.layered import check_device  # noqa: PLC0415

        check_device(self.device)
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    def resolved_dtype(self, checkpoint: Checkpoint) -> torch.dtype:
        """The compute type; 'auto' is float32 on a CPU and the checkpoint's own type on a GPU."""
        import torch  # noqa: PLC0415

        chosen = torch_dtype(self.dtype)
        if chosen is not None:
            return chosen
        own = checkpoint.dtype
        return own if self.resolved_device() == "cuda" and isinstance(own, torch.dtype) else torch.float32

    def compute(self, checkpoint: Checkpoint) -> ComputeOptions:
        """How layers run."""
        from prism_refactor.models.stream import ComputeOptions  # noqa: PLC0415

        return ComputeOptions(self.resolved_dtype(checkpoint), self.resolved_device(), self.batch_size)

    def rows(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The token rows, int64 [S, T]. Raises InputError or UsageError as `token_rows` does."""
        from prism_refactor.calibration.text import CALIBRATION_TEXT, check_tokens, load_tokenizer, token_rows  # noqa: PLC0415

        names = list(self.datasets) or [CALIBRATION_TEXT]
        tokenizer = load_tokenizer(checkpoint.path)
        rows = token_rows(names, tokenizer, self.samples(checkpoint), self.sequence_length(checkpoint), self.seed, self.text_column)
        check_tokens(checkpoint, tokenizer, int(rows.max()))
        return rows

    def samples(self, checkpoint: Checkpoint) -> int:
        """Rows of text."""
        default = DENSE_SAMPLES if checkpoint.dense else DEFAULT_SAMPLES
        return default if self.num_samples is None else self.num_samples

    def sequence_length(self, checkpoint: Checkpoint) -> int:
        """Tokens per row. Raises UsageError when the model takes fewer than asked for."""
        limit = getattr(checkpoint.text_config, "max_position_embeddings", None)
        if self.max_seq_length is None:
            return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
        if limit and self.max_seq_length > limit:
            raise UsageError(f"`max_seq_length` {self.max_seq_length}: the model takes at most {limit} tokens")
        return self.max_seq_length

    def tokens(self, checkpoint: Checkpoint) -> int:
        """Tokens of the text, where there is enough of it."""
        return self.samples(checkpoint) * self.sequence_length(checkpoint)

    def recorded(self, rows: torch.Tensor) -> dict[str, Any]:
        """What a manifest says about a run over `rows`: the rows there were, which may be fewer or shorter than asked for."""
        counted = {"num_samples": rows.shape[0], "max_seq_length": rows.shape[1]}
        return asdict(self) | {"datasets": list(self.datasets) or ["bundled"]} | counted

    def shortage(self, rows: torch.Tensor, checkpoint: Checkpoint) -> str | None:
        """A warning when there was less text than asked for."""
        asked = self.samples(checkpoint)
        if len(rows) >= asked:
            return None
        return f"the text gives {rows.shape[0]} samples of {rows.shape[1]} tokens; {asked} were asked for"
