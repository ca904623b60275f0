"""Statistics on disk: `index.json`, and two safetensors files per MoE layer."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prism_refactor.calibration.profile import Profile
from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.statistics import INPUT_SAMPLE, LayerStatistics, merge_layers, priorities
from prism_refactor.errors import InputError
from prism_refactor.files import output_folder, write_json
from prism_refactor.formats import INDEX
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.progress import Progress, versions
from prism_refactor.tensors import save_tensors

FORMAT = 4
# Share of a token's neurons that count as active in the pictures of a page.
ACTIVE_SHARE = 1 / 8
_SHARED = ("tokens_routed", "activation_sum", "fired", "inputs", "weights", "experts")
_PER_EXPERT = ("activations", "sampled")


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


def write_statistics(target: Path, profile: Profile, resume: bool = False) -> list[dict[str, Any]]:
    """Write a statistics folder; it appears only when complete. A run that ends before leaves its finished layers in TARGET.partial.

    Args:
        target: the folder.
        profile: the statistics, while they are made.
        resume: go on after the last finished layer of an interrupted run of the same checkpoint, calibration and versions.

    Returns:
        Of each layer, `summary` (a `LayerSummary` as a dict) and `shown`, what `evaluation.page.profile_page` shows.

    Raises:
        What iterating `profile` raises; UsageError as `output_folder` does.
    """
    checkpoint = profile.checkpoint
    source = {"name": checkpoint.path.resolve().name, "fingerprint": checkpoint.fingerprint()}
    made = {"source": source, "calibration": profile.recorded, "statistics": profile.origin(), "versions": versions()}
    # The same checkpoint in another place is the same.
    identity = made | {"source": source["fingerprint"], "shard": "{}/{}".format(*profile.shard)}
    with output_folder(target, identity, resume) as folder:
        progress = Progress(folder)
        records = [record for record, _ in progress.restored()]
        last = records[-1]["summary"]["layer"] if records else -1
        profile.restore(progress.hidden_states(), last + 1)
        profile.events.resumed(last, progress.layers)
        for statistics in profile:
            files = _write_layer(folder, statistics)
            records.append(_record(statistics))
            # Not kept while the next layer is made.
            del statistics
            progress.finish_layer(records[-1], profile.state(), files)
        _write_index(folder, made, profile.shard, records)
    return records


def merge_statistics(target: Path, folders: list[Path]) -> list[dict[str, Any]]:
    """Write the statistics over a whole text from those over its shards, one layer of two shards in memory at a time.

    Args:
        target: the folder to be.
        folders: of all shards, in any order.

    Returns:
        As `write_statistics`.

    Raises:
        InputError: a folder is none of `write_statistics`, or another run's, or a shard is missing.
    """
    parts = sorted((Statistics(folder) for folder in folders), key=lambda part: part.shard)
    first = parts[0]
    for part in parts:
        for what, value in part.made.items():
            # One checkpoint may have several places.
            mine, its = ((known["fingerprint"] if what == "source" else known) for known in (value, first.made[what]))
            if mine != its:
                raise InputError(f"{part.folder}: was made with other {what} than {first.folder}; merge shards of one run")
    expected = [(number + 1, first.shard[1]) for number in range(first.shard[1])]
    if [part.shard for part in parts] != expected:
        found = ", ".join("{}/{}".format(*part.shard) for part in parts)
        raise InputError(f"{target}: the shards given are {found}; give 1/{first.shard[1]} to {first.shard[1]}/{first.shard[1]}, each once")
    calibration = Calibration(**first.calibration)
    tokens = first.calibration["num_samples"] * first.calibration["max_seq_length"]
    records = []
    with output_folder(target) as folder:
        for layer in first.layers:
            priority = priorities(calibration.seed, layer, tokens)
            statistics = merge_layers((part.read(layer) for part in parts), priority, calibration.tokens_per_expert)
            _write_layer(folder, statistics)
            records.append(_record(statistics))
            del statistics
        _write_index(folder, first.made, (1, 1), records)
    return records


def _record(statistics: LayerStatistics) -> dict[str, Any]:
    """What is kept of a layer for the index, the table and the page, as JSON values."""
    summary, expert = LayerSummary.of(statistics), int(statistics.tokens_routed.argmax())
    shown = {
        "layer": statistics.layer,
        "tokens": statistics.tokens_routed.tolist(),
        "fixed_quarter": statistics.fixed_quarter_share(),
        "own_quarter": summary.top_quarter_share,
        "expert": expert,
        "picture": statistics.coactivation_picture(expert, ACTIVE_SHARE).tolist(),
    }
    return {"summary": asdict(summary), "shown": shown}


def _write_index(folder: Path, made: dict[str, Any], shard: tuple[int, int], records: list[dict[str, Any]]) -> None:
    write_json(folder / INDEX, {"format": FORMAT} | made | {"shard": list(shard), "layers": [record["summary"] for record in records]})


def _layer_path(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.safetensors"


def _write_layer(folder: Path, statistics: LayerStatistics) -> list[Path]:
    """Returns the files."""
    tensors = {name: getattr(statistics, name).contiguous() for name in _SHARED}
    for name in _PER_EXPERT:
        tensors |= {f"{name}.{expert}": value.contiguous() for expert, value in enumerate(getattr(statistics, name))}
    path = _layer_path(folder, statistics.layer)
    save_tensors(tensors, path)
    # A count is at most tokens_per_expert, which the command line keeps below 2^16.
    coactivation = {
        f"coactivation.{expert}": statistics.coactivation(expert).to(torch.uint16) for expert in range(len(statistics.activations))
    }
    save_tensors(coactivation, path.with_suffix(".coactivation.safetensors"))
    return [path, path.with_suffix(".coactivation.safetensors")]


def estimated_bytes(checkpoint: Checkpoint, calibration: Calibration, shards: int = 1) -> int:
    """Size of the statistics folder, at most: input and activation samples and co-activation of every layer; and of the text's state."""
    architecture, config = checkpoint.architecture, checkpoint.text_config
    experts, top_k, neurons, *_ = architecture.sizes(config).values()
    width = calibration.resolved_dtype(checkpoint).itemsize
    tokens = calibration.tokens(checkpoint)
    sample = min(calibration.tokens_per_expert, tokens)
    inputs = min(INPUT_SAMPLE, tokens) * (width * (config.hidden_size + top_k) + 8 * top_k)
    text = 2 * width * tokens * architecture.streams * config.hidden_size // shards
    return text + config.num_hidden_layers * (inputs + experts * (width * sample * neurons + 2 * neurons**2 + 16 * neurons + 8 * sample))


class Statistics:
    """A statistics folder.

    Args:
        folder: which.
        checkpoint: that it must belong to, whole; None for any, or a shard.

    Attributes:
        made: with what: the checkpoint's name and fingerprint, calibration, text and type of the numbers, versions.
        calibration: as recorded.
        shard: (I, M).
        layers: indices of the layers.

    Raises:
        InputError: not such a folder, or made from another checkpoint.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint | None = None):
        self.folder, self._first = folder, 0
        try:
            index = json.loads((folder / INDEX).read_text())
            written = index["format"]
            self.made = {key: index.get(key) for key in ("source", "calibration", "statistics", "versions")}
            self.calibration = index["calibration"]
            Calibration(**self.calibration)
            self.layers: list[int] = [layer["layer"] for layer in index["layers"]]
            self._unrouted = {layer["layer"]: layer["unrouted"] for layer in index["layers"]}
            fingerprint = index["source"]["fingerprint"]
            number, shards = index["shard"] if written == FORMAT else (1, 1)
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{folder}: no readable {INDEX}; make the folder with prism-profile") from None
        self.shard: tuple[int, int] = (number, shards)
        if written != FORMAT:
            raise InputError(f"{folder}: format {written} is not this version's {FORMAT}; run prism-profile again")
        if checkpoint is not None and fingerprint != checkpoint.fingerprint():
            raise InputError(f"{folder}: was made from another checkpoint than {checkpoint.path}; run prism-profile again")
        if checkpoint is not None and shards > 1:
            raise InputError(f"{folder}: is shard {number}/{shards}; merge all of them first with prism-profile merge")
        for layer in self.layers:
            # Its header is there and fits its size.
            self._open(layer).__exit__(None, None, None)

    def __iter__(self) -> Iterator[LayerStatistics]:
        for layer in self.layers:
            if layer >= self._first:
                yield self.read(layer)

    @property
    def recorded(self) -> dict[str, Any]:
        """The calibration, for a manifest."""
        return self.calibration

    def origin(self) -> str:
        """See `StatisticsSource`."""
        return "read from --stats"

    def state(self) -> dict[str, torch.Tensor]:
        """None is needed: the layers are read one by one."""
        return {}

    def restore(self, _: dict[str, torch.Tensor], first: int) -> None:
        """Start with layer `first`."""
        self._first = first

    def _open(self, layer: int) -> Any:
        path = _layer_path(self.folder, layer)
        try:
            return safe_open(path, framework="pt").__enter__()
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: missing or truncated ({error}); run prism-profile again") from None

    def read(self, layer: int) -> LayerStatistics:
        """One layer's statistics. Raises InputError when they are not whole or not finite."""
        path = _layer_path(self.folder, layer)
        with self._open(layer) as file:
            try:
                # Copies, for matrix products of what is not aligned in memory as what was computed here may differ in the last bit.
                shared = {name: file.get_tensor(name).clone() for name in _SHARED}
                experts = range(len(shared["tokens_routed"]))
                activations, sampled = ([file.get_tensor(f"{name}.{expert}").clone() for expert in experts] for name in _PER_EXPERT)
            except SafetensorError as error:
                raise InputError(f"{path}: does not hold what prism-profile writes ({error}); run it again") from None
        if not all(torch.isfinite(value).all() for value in (shared["inputs"], shared["weights"], *activations)):
            raise InputError(f"{path}: holds numbers that are not finite; run prism-profile again")
        return LayerStatistics(layer=layer, activations=activations, sampled=sampled, unrouted=self._unrouted[layer], **shared)
