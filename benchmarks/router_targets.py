"""What the choices behind the default router and partition are worth: layer-output error for each --keep and each ridge target.

    python benchmarks/router_targets.py

On examples/olmoe-tiny, N = 4, partitions by the default solver. The two-level frame throughout: the original top-4 experts, their 16
sub-experts ranked, the best k run. Targets of the ridge regression, from the MoE input to: 'contribution', s_j = sum |a_c| ||down[:, c]||
(the product's); 'log share', log s_j - log mean_j s; 'log', log s_j. 'oracle' ranks by the true norm of each sub-expert's output.
Fitted on the bundled calibration text, measured on the evaluation text; squared error relative to the squared norm, mean over layers.
"""

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from common import EXAMPLE, print_provenance
from joblib import Parallel, delayed
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import solvers
from calibration import CALIBRATION_TEXT, EVALUATION_TEXT, load_tokenizer, token_rows
from prism_cli.options import table
from routers.linear import RIDGE

SUB_EXPERTS, CHOICES, SAMPLE = 4, (4, 6, 8, 12), 2048
TARGETS = {
    "contribution": (lambda s: s, lambda p, s: p * s.clamp_min(1e-6)),
    "log share": (lambda s: s.log() - s.mean(-1, keepdim=True).log(), lambda p, s: p.log() + s),
    "log": (lambda s: s.log(), lambda p, s: p.log() + s),
}


def block_inputs(model, rows: torch.Tensor) -> list[torch.Tensor]:
    """MoE inputs [T, H] of every layer."""
    inputs = defaultdict(list)
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, arguments, index=index: inputs[index].append(arguments[0].flatten(0, 1)))
        for index, layer in enumerate(model.model.layers)
    ]
    for batch in rows.split(8):
        model.model(batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in inputs.values()]


def activations(experts, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    return experts._apply_gate(inputs @ experts.gate_up_proj[expert].T)


def ridge(inputs: torch.Tensor, target: torch.Tensor):
    mean, target_mean = inputs.mean(0).double(), target.mean(0).double()
    centred = inputs.double() - mean
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    rows = torch.linalg.solve(gram, centred.T @ (target.double() - target_mean))
    return lambda new: ((new.double() - mean) @ rows + target_mean).float()


def layer_errors(block, fit: torch.Tensor, test: torch.Tensor, keep: int) -> dict[tuple[str, int], float]:
    """{(target, k): error} of one MoE block."""
    experts, top_k = block.experts, block.gate.top_k
    _, _, fit_index = block.gate(fit)
    _, weights, index = block.gate(test)
    routed = [(fit_index == expert).any(-1) for expert in range(experts.num_experts)]
    saliency = [
        activations(experts, expert, fit[chosen]).abs() * experts.down_proj[expert].norm(dim=0) for expert, chosen in enumerate(routed)
    ]
    solved = Parallel(2)(delayed(solvers.solve)(matrix[:SAMPLE].numpy(), SUB_EXPERTS, keep) for matrix in saliency)
    shape = (len(test), top_k, SUB_EXPERTS)
    outputs, scores = torch.zeros(*shape, test.shape[1]), {name: torch.zeros(shape) for name in TARGETS}
    for expert, partition in enumerate(solved):
        members = F.one_hot(torch.from_numpy(partition.labels).long(), SUB_EXPERTS).float()
        tokens, slots = torch.where(index == expert)
        activated = activations(experts, expert, test[tokens])
        for part in range(SUB_EXPERTS):
            outputs[tokens, slots, part] = (activated * members[:, part]) @ experts.down_proj[expert].T * weights[tokens, slots, None]
        contribution = saliency[expert] @ members + 1e-9
        for name, (target, _) in TARGETS.items():
            scores[name][tokens, slots] = ridge(fit[routed[expert]], target(contribution))(test[tokens])
    ranks = {name: rank(weights[..., None], scores[name]) for name, (_, rank) in TARGETS.items()}
    ranks["oracle"] = outputs.norm(dim=-1)
    exact, flat = outputs.sum((1, 2)), outputs.flatten(1, 2)
    errors = {}
    for name, rank in ranks.items():
        for k in CHOICES:
            chosen = rank.flatten(1).topk(k).indices[..., None].expand(-1, -1, test.shape[1])
            errors[name, k] = ((flat.gather(1, chosen).sum(1) - exact).square().sum() / exact.square().sum()).item()
    for k in CHOICES:
        if k % SUB_EXPERTS == 0:
            whole = outputs[:, : k // SUB_EXPERTS].sum((1, 2))
            errors["original, k / 4 experts", k] = ((whole - exact).square().sum() / exact.square().sum()).item()
    return errors


@torch.inference_mode()
def main() -> None:
    logging.disable_progress_bar()
    print_provenance()
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    tokenizer = load_tokenizer(EXAMPLE)
    fit = block_inputs(model, token_rows([CALIBRATION_TEXT], tokenizer, 256, 512, 0))
    test = block_inputs(model, token_rows([EVALUATION_TEXT], tokenizer, 32, 512, 0))
    lines = []
    for keep in (1, 2, 3):
        layers = [layer_errors(layer.mlp, *inputs, keep) for layer, *inputs in zip(model.model.layers, fit, test, strict=True)]
        for name in dict.fromkeys(name for name, _ in layers[0]):
            cells = [np.mean([errors[name, k] for errors in layers]) if (name, k) in layers[0] else None for k in CHOICES]
            lines.append([keep, name, *("" if cell is None else f"{cell:.4f}" for cell in cells)])
    print(table(["keep", "ranked by", *(f"k = {k}" for k in CHOICES)], lines))


if __name__ == "__main__":
    main()
