"""What the files of a refactored checkpoint say: its config, its router file, the rows of its gate neurons, what was measured of it."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

ROUTER_FILE, EVALUATION, INDEX = "sub_expert_router.safetensors", "evaluation.json", "model.safetensors.index.json"
_ROUTER = re.compile(r"(.*layers\.(\d+)\..*?)\.(?:gate|router)\.(.*)")
# What families call the gate and up projection of one expert, or its only one.
_PROJECTIONS = (("gate_proj", "up_proj"), ("w1", "w3"), ("up_proj",))
# And the matrix that holds both, of all experts. In gpt-oss' a gate column and its up column are neighbours.
_FUSED, _INTERLEAVED = ("input_linear.weight", "experts.gate_up_proj"), "experts.gate_up_proj_bias"


class CheckpointError(ValueError):
    """The checkpoint cannot be served with two-level routing; the message says why and what to do."""


def gate_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the matrix of the original router [E, H], out of a layer's tensors; families have it in different parts of their router."""
    return next(value for name, value in tensors.items() if name.startswith("original.") and value.ndim == 2 and name.endswith("weight"))


@dataclass(frozen=True)
class RefactoredCheckpoint:
    """A checkpoint that prism-refactor has written.

    Attributes:
        config: the object `prism` of its config.json: `sub_experts`, `factor`, `router`, `top_k` (the key) and `source` (sizes of the
            original), where the router chooses among groups of experts `groups`.
        most: active sub-experts per token that config.json, perhaps overridden, allows.
        path: gives the local path of one of its files, None if it does not exist.
    """

    config: dict[str, Any]
    most: int
    path: Callable[[str], str | None] = field(compare=False)

    @property
    def top_k(self) -> int:
        """Active experts of the original."""
        return int(self.config["source"][self.config["top_k"]])

    @property
    def full(self) -> int:
        """Sub-experts per token at which the model is the original."""
        return self.top_k * int(self.config["sub_experts"])

    @property
    def groups(self) -> int:
        """Groups of experts of the original, where sub-experts lie group by group; else 1."""
        return int(self.config.get("groups", 1))

    def _places(self, experts: int) -> torch.Tensor:
        """Which of the model's experts each sub-expert e N + n is: int64 [E * N], as `modeling_prism.places`."""
        numbers = torch.arange(experts * int(self.config["sub_experts"]))
        return numbers.view(self.groups, int(self.config["sub_experts"]), -1).transpose(1, 2).flatten() if self.groups > 1 else numbers

    @cached_property
    def blocks(self) -> list[tuple[int, str]]:
        """(decoder layer, name) of every MoE block, in their order. Raises CheckpointError when the router file is missing."""
        with safe_open(self._router_file, "pt") as file:
            return sorted({(int(match[2]), match[1]) for name in file.keys() if (match := _ROUTER.fullmatch(name))})  # noqa: SIM118

    @cached_property
    def has_thresholds(self) -> bool:
        """Whether tokens can run within budgets."""
        with safe_open(self._router_file, "pt") as file:
            return any(name.endswith(".threshold") for name in file.keys())  # noqa: SIM118

    @cached_property
    def _router_file(self) -> str:
        found = self.path(ROUTER_FILE)
        if found is None:
            raise CheckpointError(f"has no {ROUTER_FILE}; copy it from the folder that prism-refactor wrote")
        return found

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a decoder layer's router, by their names in `modeling_prism.TwoLevelRouter`, and its gate neurons' rows."""
        block = dict(self.blocks)[layer]
        with safe_open(self._router_file, "pt") as file:
            found = {match[3]: file.get_tensor(name) for name in file.keys() if (match := _ROUTER.fullmatch(name)) and match[1] == block}  # noqa: SIM118
        if self.groups > 1:
            found["places"] = self._places(len(gate_of(found)))
        neurons = found.pop("gate_neurons", None)
        return found if neurons is None else found | self._rows(layer, neurons)

    def _rows(self, layer: int, neurons: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gate rows, then the up rows, of the gate neurons [E, N, r] of a layer: `rows` [E, N, 2r, H], perhaps `row_bias`."""
        # Files may call a block otherwise than the model does, so it is known by its layer and its router.
        inside = {name.split(f"layers.{layer}.")[-1]: name for name in self._shards if f"layers.{layer}." in name}
        routed = {leaf.partition(".")[0] for leaf in inside if leaf.partition(".")[2].startswith(("gate.", "router."))}
        names = {leaf.partition(".")[2]: name for leaf, name in inside.items() if leaf.partition(".")[0] in routed}
        places = self._places(len(neurons)).tolist()
        parts = [self._expert_rows(names, place, own) for place, own in zip(places, neurons.flatten(0, 1), strict=True)]
        found = {"rows": torch.stack([rows for rows, _ in parts])}
        if parts[0][1] is not None:
            found["row_bias"] = torch.stack([bias for _, bias in parts if bias is not None])
        return {name: value.unflatten(0, neurons.shape[:2]) for name, value in found.items()}

    def _expert_rows(self, names: dict[str, str], number: int, neurons: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Those of one sub-expert: ([2r, H], [2r] or None). `names`: of the layer's tensors, by what follows the block's name."""
        for projections in _PROJECTIONS:
            own = [f"experts.{number}.{projection}.weight" for projection in projections]
            if own[0] in names:
                return torch.cat([self._read(names[name])[neurons] for name in own]), None
        fused = next((names[name] for name in _FUSED if name in names), None)
        if fused is None:
            raise CheckpointError("its experts' tensors have names that this plugin does not know; use the router 'linear'")
        matrix = self._read(fused, number)
        if _INTERLEAVED in names:
            places = torch.cat([2 * neurons, 2 * neurons + 1])
            return matrix[:, places].T, self._read(names[_INTERLEAVED], number)[places]
        return matrix[torch.cat([neurons, neurons + len(matrix) // 2])], None

    @cached_property
    def _shards(self) -> dict[str, str]:
        """The file of every tensor."""
        index = self.path(INDEX)
        if index is not None:
            return dict(json.loads(Path(index).read_text())["weight_map"])
        with safe_open(str(self.path("model.safetensors")), "pt") as file:
            return dict.fromkeys(file.keys(), "model.safetensors")

    def _read(self, name: str, number: int | None = None) -> torch.Tensor:
        """A tensor, or one entry of it."""
        shard = self._shards[name]
        if shard not in self._open:
            # Opened once: a layer of the router 'proxy' reads every sub-expert.
            self._open[shard] = safe_open(str(self.path(shard)), "pt")
        file = self._open[shard]
        return file.get_tensor(name) if number is None else file.get_slice(name)[number]

    @cached_property
    def _open(self) -> dict[str, Any]:
        """The shards that were read from."""
        return {}

    @cached_property
    def quality(self) -> dict[int, float] | None:
        """The quality of every k from the least measured one on, as `prism-eval --save` measured it; None where it did not.

        Quality is the perplexity of the full model divided by that at k. Between measured k it is interpolated, and more sub-experts
        count as no worse than fewer.
        """
        path = self.path(EVALUATION)
        curves = json.loads(Path(path).read_text())["refactored"] if path else []
        points: list[dict[str, Any]] = next((curve["points"] for curve in curves if curve["router"] == "two-level"), [])
        measured = {point["k"]: point["perplexity"] for point in points}
        if len(measured) < 2 or self.full not in measured or not np.isfinite(list(measured.values())).all():
            return None
        ks = np.array(sorted(measured))
        logs = np.minimum.accumulate(np.log([measured[k] for k in ks]))
        every = np.arange(ks[0], ks[-1] + 1)
        return dict(zip(every.tolist(), np.exp(logs[-1] - np.interp(every, ks, logs)).tolist(), strict=True))
