"""Statistics on disk: `index.json`, and two safetensors files per MoE layer."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from calibration.profile import Calibration
from calibration.statistics import INPUT_SAMPLE, LayerStatistics
from checkpoints import Checkpoint, output_folder, save_tensors, write_json
from prism_errors import InputError

INDEX = "index.json"
FORMAT = 2
_SHARED = ("tokens_routed", "mean_activation", "firing_frequency", "inputs")


@dataclass(frozen=True)
class LayerSummary:
    """One row of the table `prism-profile` prints."""

    layer: int
    experts: int
    tokens_routed: int
    least_routed: int
    top_quarter_share: float
    below_floor: list[int]
    unrouted: list[int]

    @classmethod
    def of(cls, statistics: LayerStatistics) -> "LayerSummary":
        """Summarise one layer."""
        routed = statistics.tokens_routed
        return cls(
            statistics.layer,
            len(routed),
            int(routed.sum()),
            int(routed.min()),
            round(statistics.top_quarter_share(), 4),
            statistics.below_floor(),
            statistics.unrouted,
        )


def write_statistics(
    target: Path, checkpoint: Checkpoint, calibration: dict[str, Any], layers: Iterable[LayerStatistics]
) -> list[LayerSummary]:
    """Write a statistics folder; it appears only when complete. Raises what iterating `layers` raises."""
    summaries = []
    with output_folder(target) as folder:
        for statistics in layers:
            _write_layer(folder, statistics)
            summaries.append(LayerSummary.of(statistics))
            # Not kept while the next layer is made.
            del statistics
        index = {
            "format": FORMAT,
            "source": {"name": checkpoint.path.resolve().name, "fingerprint": checkpoint.fingerprint()},
            "calibration": calibration,
            "layers": [asdict(summary) for summary in summaries],
        }
        write_json(folder / INDEX, index)
    return summaries


def _write_layer(folder: Path, statistics: LayerStatistics) -> None:
    tensors = {name: getattr(statistics, name).contiguous() for name in _SHARED}
    tensors |= {f"activations.{expert}": sample.contiguous() for expert, sample in enumerate(statistics.activations)}
    save_tensors(tensors, folder / f"layer-{statistics.layer:05d}.safetensors")
    # A count is at most tokens_per_expert, which the command line keeps below 2^16.
    coactivation = {
        f"coactivation.{expert}": statistics.coactivation(expert).to(torch.uint16) for expert in range(len(statistics.activations))
    }
    save_tensors(coactivation, folder / f"layer-{statistics.layer:05d}.coactivation.safetensors")


def estimated_bytes(checkpoint: Checkpoint, calibration: Calibration) -> int:
    """Size of the statistics folder, at most: input and activation samples and co-activation of every layer."""
    architecture, config = checkpoint.architecture, checkpoint.config
    experts, _, neurons, *_ = architecture.sizes(config).values()
    width = calibration.resolved_dtype(checkpoint).itemsize
    tokens = calibration.tokens(checkpoint)
    sample = min(calibration.tokens_per_expert, tokens)
    inputs = width * min(INPUT_SAMPLE, tokens) * config.hidden_size
    return config.num_hidden_layers * (inputs + experts * (width * sample * neurons + 2 * neurons**2))


class Statistics:
    """A statistics folder that belongs to a checkpoint.

    Raises:
        InputError: not such a folder, or made from another checkpoint.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint):
        self.folder, self._first = folder, 0
        try:
            index = json.loads((folder / INDEX).read_text())
            self.calibration: dict[str, Any] = index["calibration"]
            self.layers: list[int] = [layer["layer"] for layer in index["layers"]]
            self._unrouted = {layer["layer"]: layer["unrouted"] for layer in index["layers"]}
            fingerprint, written = index["source"]["fingerprint"], index["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"--stats {folder}: no readable {INDEX}; make the folder with prism-profile") from None
        if written != FORMAT:
            raise InputError(f"--stats {folder}: format {written} is not this version's {FORMAT}; run prism-profile again")
        if fingerprint != checkpoint.fingerprint():
            raise InputError(f"--stats {folder}: was made from another checkpoint than {checkpoint.path}; run prism-profile again")

    def __iter__(self) -> Iterator[LayerStatistics]:
        for layer in self.layers:
            if layer >= self._first:
                yield self._read(layer)

    def origin(self) -> str:
        """Where the statistics come from."""
        return "read from --stats"

    def state(self) -> dict[str, torch.Tensor]:
        """None is needed: the layers are read one by one."""
        return {}

    def restore(self, _: dict[str, torch.Tensor], first: int) -> None:
        """Start with layer `first`."""
        self._first = first

    def _read(self, layer: int) -> LayerStatistics:
        path = self.folder / f"layer-{layer:05d}.safetensors"
        try:
            tensors = load_file(path)
            shared = {name: tensors[name] for name in _SHARED}
            activations = [tensors[f"activations.{expert}"] for expert in range(len(shared["tokens_routed"]))]
        except (OSError, KeyError, SafetensorError) as error:
            raise InputError(f"{path}: missing or truncated ({error}); run prism-profile again") from None
        return LayerStatistics(layer=layer, activations=activations, unrouted=self._unrouted[layer], **shared)
