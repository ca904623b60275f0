"""Which part of the method is worth what: N x partition x saliency x router, as perplexity on text that calibration never saw.

    python benchmarks/quality.py WORK_DIR [--sub-experts 4] [--tokens 8192]

Profiles examples/olmoe-tiny, refactors it with `prism-refactor` for every N, partition and saliency, and runs every router on each result
at a quarter, half and three quarters of the active parameters, over the same windows of the bundled evaluation text (without the
Japanese document, on which the model is better with fewer experts). WORK_DIR keeps the statistics and what is measured
(quality.json, every combination); a stopped run goes on from there. Hours on two cores: `--sub-experts N` does one N at a time.

Routers. On the stock gate: `replicate` (rows repeated), `finetuned` (`prism-finetune --router stock`). Two-level: `proxy` (the
paper's gate neurons), `linear` (the default), `refined` (the linear rows trained layer by layer on
the output error of a soft top-k), `oracle` (true norms). All two-level ones but the paper's have the compensation fitted for them;
`linear -` and `oracle -` are without it: selection alone.
"""

import argparse
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import EXAMPLE, markdown, print_provenance, summed_loss
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.statistics import coactive_marks
from prism_refactor.calibration.store import Statistics
from prism_refactor.calibration.text import EVALUATION_TEXT
from prism_refactor.cli import app as door
from prism_refactor.cli import finetune, profile, refactor
from prism_refactor.evaluation.windows import read_windows
from prism_refactor.files import write_json
from prism_refactor.formats import PrismConfig
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.experts import EXPERTS, by_expert, sub_expert_activations, sub_expert_outputs
from prism_refactor.models.modeling_prism import (
    ROUTER_FILE,
    TwoLevelRouter,
    attach,
    moe_gates,
    router_tensors,
    set_active,
    two_level_router,
)
from prism_refactor.recipe import SALIENCIES, Recipe
from prism_refactor.routing.compensation import fit_compensation
from prism_refactor.routing.linear import log_sizes
from prism_refactor.routing.proxy import gate_neurons
from prism_refactor.routing.sample import Routed

PARTITIONS = ("contiguous", "random", "greedy", "annealing", "ascent", "genetic")
SHARES = (1 / 4, 1 / 2, 3 / 4)
ROUTERS = ("replicate", "finetuned", "proxy", "linear -", "linear", "refined", "oracle -", "oracle")
DEFAULT = (Recipe().solver, Recipe().saliency)
BATCH, TEMPERATURE, STEPS, LEARNING_RATE = 2048, 0.1, 200, 1e-3
FINETUNING = ["--router", "stock", "--steps", "40", "--num-samples", "128", "--max-seq-length", "256", "--quiet"]


class OracleRouter(TwoLevelRouter):
    """Ranks sub-experts by the size their output will really have."""

    experts: Any

    def log_size(self, hidden_states: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        sizes = torch.empty(*experts.shape, self.sub_experts)
        slot = torch.arange(experts.shape[1]).expand(experts.shape)
        for expert, tokens, slots in by_expert(experts, slot, self.experts[0].num_experts // self.sub_experts):
            activations = sub_expert_activations(self.experts[0], expert, hidden_states[tokens])
            sizes[tokens, slots] = log_sizes(sub_expert_outputs(self.experts[0], expert, activations))
        return sizes


def two_level(block: Any, config: Any, tensors: dict[str, torch.Tensor], kind: str) -> Any:
    """A two-level router of some kind, without compensation unless `tensors` has one."""
    config.prism["router"] = kind
    return two_level_router(block, config, tensors)


def oracle(block: Any, config: Any, tensors: dict[str, torch.Tensor]) -> Any:
    router = two_level(block, config, tensors, "oracle")
    router.__class__, router.experts = OracleRouter, (block.experts,)
    return router


def compensated(router: Any, block: Any, sample: Routed) -> Any:
    """The router with the compensation fitted for it."""
    for name, tensor in fit_compensation(router, block.experts, sample).items():
        router.register_buffer(name, tensor, persistent=False)
    return router


def gram(router: Any, experts: Any, sample: Routed) -> torch.Tensor:
    """Products of the weighted outputs of each token's K N sub-experts, [T, K N, K N]: what dropping any set of them costs."""
    rows = []
    width, hidden = router.sub_experts, sample.inputs.shape[1]
    for inputs, weights, chosen in zip(sample.inputs.split(BATCH), sample.weights.split(BATCH), sample.experts.split(BATCH), strict=True):
        outputs = torch.zeros(*chosen.shape, width, hidden)
        slot = torch.arange(chosen.shape[1]).expand(chosen.shape)
        for expert, tokens, slots in by_expert(chosen, slot, experts.num_experts // width):
            activations = sub_expert_activations(experts, expert, inputs[tokens])
            outputs[tokens, slots] = sub_expert_outputs(experts, expert, activations) * weights[tokens, slots, None, None]
        flat = outputs.flatten(1, 2)
        rows.append(flat @ flat.transpose(1, 2))
    return torch.cat(rows)


def refine(router: Any, experts: Any, sample: Routed) -> Any:
    """Train the linear rows so that a soft top-k loses least of the layer's output, k anywhere below full; on whitened inputs."""
    with torch.inference_mode():
        products = gram(router, experts, sample)
        centre = sample.inputs.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(sample.inputs.T))
        whitening = vectors * (values + 1e-2 * values.mean()).rsqrt()
    shape = router.weight.shape
    step = torch.zeros(shape[0] * shape[1], shape[2], requires_grad=True)
    bias = torch.zeros(shape[0] * shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([step, bias], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    full = products.shape[1]
    for _ in range(STEPS):
        tokens = torch.randint(len(sample.inputs), (BATCH,), generator=generator)
        k = int(torch.randint(1, full, (), generator=generator))
        inputs, chosen = sample.inputs[tokens], sample.experts[tokens]
        rows = F.linear((inputs - centre) @ whitening, step, bias).view(len(tokens), *shape[:2])
        with torch.no_grad():
            start = router.rank(inputs, sample.weights[tokens], chosen)
        value = start + rows.gather(1, chosen[..., None].expand(-1, -1, shape[1])).flatten(1)
        ordered = value.sort(1, descending=True).values
        dropped = torch.sigmoid((ordered[:, k - 1 : k + 1].mean(1, keepdim=True) - value) / TEMPERATURE)
        lost = torch.einsum("ti,tij,tj->t", dropped, products[tokens], dropped).sum()
        loss = lost / products[tokens].sum((1, 2)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        moved = (step @ whitening.T).view(shape)
        router.weight = router.weight + moved
        router.bias = router.bias + bias.view(shape[:2]) - moved @ centre
        router.ceiling = router.ceiling + 1.0
    return router


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=EXPERTS)


class Ablation:
    """Everything measured so far, in WORK_DIR/quality.json: {name: perplexity at each share}."""

    def __init__(self, folder: Path, tokens: int):
        self.folder, self.path = folder, folder / "quality.json"
        self.found: dict[str, list[float]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        text = folder / "evaluation.jsonl"
        lines = Path(EVALUATION_TEXT).read_text().splitlines(keepends=True)
        text.write_text("".join(line for line in lines if "perljp" not in line))
        windows = read_windows(Calibration((str(text),), max_seq_length=512), Checkpoint(EXAMPLE), 512)
        # Windows from all over the text.
        chosen = torch.linspace(0, len(windows.rows) - 1, min(len(windows.rows), tokens // 512)).long()
        self.windows = replace(
            windows, rows=windows.rows[chosen], scored=windows.scored[chosen], domains=[windows.domains[row] for row in chosen]
        )
        if not (folder / "statistics").exists():
            run(profile, EXAMPLE, folder / "statistics", "--quiet")

    def measure(self, name: str, model: Any, choices: list[int], set_active: Callable[[Any, int], None]) -> None:
        found = []
        for k in choices:
            set_active(model, k)
            found.append(math.exp(summed_loss(model, self.windows) / self.windows.tokens))
        self.found[name] = found
        write_json(self.path, self.found)

    def original(self) -> None:
        if "original" in self.found:
            return
        model = load(EXAMPLE)

        def set_active(model: Any, k: int) -> None:
            for gate in moe_gates(model):
                gate.top_k = k

        self.measure("original", model, [1, 2, 3, 4], set_active)

    def partition(self, sub_experts: int, solver: str, saliency: str) -> None:
        """All routers on one partition."""
        names = {router: f"{sub_experts} {solver} {saliency} {router}" for router in ROUTERS}
        missing = {router for router, name in names.items() if name not in self.found}
        if not missing:
            return
        target = self.folder / "refactored"
        options = ["--sub-experts", sub_experts, "--solver", solver, "--saliency", saliency, "--stats", self.folder / "statistics"]
        run(refactor, EXAMPLE, target, *options, "--overwrite", "--quiet")
        full = 4 * sub_experts
        choices = [round(share * full) for share in SHARES]
        for router, model in self._models(target, missing, sub_experts):
            self.measure(names[router], model, choices, set_active)
        shutil.rmtree(target)

    def _models(self, target: Path, wanted: set[str], sub_experts: int) -> Iterator[tuple[str, Any]]:
        """(router, model that runs it) for the wanted routers, one after the other; some share a model."""
        model = load(target)
        tensors = router_tensors(target / ROUTER_FILE)
        if "replicate" in wanted:
            yield "replicate", model
        if "finetuned" in wanted:
            tuned = target.with_name("finetuned")
            # What a stopped run left.
            shutil.rmtree(target.with_name("finetuned.partial"), ignore_errors=True)
            run(finetune, target, tuned, *FINETUNING, "--overwrite")
            yield "finetuned", load(tuned)
            shutil.rmtree(tuned)
        attach(model, target)
        for router in ROUTERS:
            if router in wanted - {"replicate", "finetuned"}:
                for (name, parts), layer in zip(tensors.items(), Statistics(self.folder / "statistics", Checkpoint(EXAMPLE)), strict=True):
                    block = model.get_submodule(name)
                    block.experts.two_level = self._router(router, block, model.config, parts, layer)
                yield router, model

    def _router(self, router: str, block: Any, config: Any, tensors: dict[str, torch.Tensor], layer: Any) -> Any:
        """One layer's two-level router, fitted where the checkpoint does not hold it."""
        if router == "linear":
            return two_level(block, config, tensors, "linear")
        bare = {name: tensor for name, tensor in tensors.items() if name not in ("compensation", "scale", "map_in", "map_out")}
        sub_experts = PrismConfig(**config.prism).sub_experts
        inputs, original = layer.inputs.float(), two_level(block, config, bare, "linear")
        sample, _ = Routed(inputs, *original.route(inputs)[1:]).split()
        if router == "linear -":
            return two_level(block, config, bare, "linear")
        if router == "refined":
            return compensated(refine(two_level(block, config, bare, "linear"), block.experts, sample), block, sample)
        if router == "oracle -":
            return oracle(block, config, bare)
        if router == "oracle":
            return compensated(oracle(block, config, bare), block, sample)
        labels = tensors["neuron_sub_expert"].long()
        rows = {name: tensor for name, tensor in bare.items() if name.startswith("original.")}
        marks = [coactive_marks(activations) for activations in layer.activations]
        chosen = [gate_neurons(mark, label, sub_experts) for mark, label in zip(marks, labels, strict=True)]
        return two_level(block, config, rows | {"gate_neurons": torch.stack(chosen)}, "proxy")


def run(module: Any, *arguments: Any) -> None:
    """One of our commands, in this process."""
    assert door.run(module.main.command, [str(argument) for argument in arguments]) == 0


def tables(found: dict[str, list[float]], sub_experts: list[int]) -> str:
    """What was measured, as Markdown: one part varied at a time, then everything at a quarter of the active experts."""

    def cell(name: str, shares: int = len(SHARES)) -> str:
        return " / ".join(f"{value:.2f}" for value in found[name][:shares]) if name in found else "-"

    solver, saliency = DEFAULT
    blocks = {
        f"router ({solver} partition, {saliency})": {router: f"{{}} {solver} {saliency} {router}" for router in ROUTERS},
        f"partition ({saliency}), linear router": {each: f"{{}} {each} {saliency} linear" for each in PARTITIONS},
        f"partition ({saliency}), oracle": {each: f"{{}} {each} {saliency} oracle" for each in PARTITIONS},
        f"saliency ({solver} partition), linear router": {each: f"{{}} {solver} {each} linear" for each in SALIENCIES},
    }
    parts = []
    for title, patterns in blocks.items():
        rows = [[name, *(cell(pattern.format(count)) for count in sub_experts)] for name, pattern in patterns.items()]
        parts.append(markdown([title, *(f"N = {count}" for count in sub_experts)], rows))
    for count in sub_experts:
        rows = []
        for router in ROUTERS:
            cells = [" / ".join(cell(f"{count} {each} {saliency} {router}", 1) for saliency in SALIENCIES) for each in PARTITIONS]
            rows.append([router, *cells])
        parts.append(markdown([f"N = {count}, 1/4: {' / '.join(SALIENCIES)}", *PARTITIONS], rows))
    return "\n\n".join(parts)


def main(folder: Path, sub_experts: list[int], tokens: int, measured: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ablation = Ablation(folder, tokens)
    if not measured:
        ablation.original()
        for count, solver, saliency in itertools.product(sub_experts, PARTITIONS, SALIENCIES):
            ablation.partition(count, solver, saliency)
            print(f"{count} {solver} {saliency}: done", file=sys.stderr, flush=True)
    windows, original = ablation.windows, ablation.found["original"]
    print(f"{windows.tokens} tokens in {len(windows.rows)} windows; perplexity at 1/4, 1/2, 3/4 of the active experts")
    print("the original at 1, 2, 3, 4 of its 4 experts: " + " / ".join(f"{value:.2f}" for value in original) + "\n")
    print(tables(ablation.found, sub_experts))


if __name__ == "__main__":
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--sub-experts", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--measured", action="store_true", help="only print what WORK_DIR holds")
    options = parser.parse_args()
    print_provenance()
    main(options.work_dir, options.sub_experts, options.tokens, options.measured)
