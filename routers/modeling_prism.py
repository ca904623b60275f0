"""Two-level routing for a refactored Mixture-of-Experts checkpoint. Needs torch, transformers and safetensors, nothing else.

This file is copied into every refactored checkpoint, where `from_pretrained(folder, trust_remote_code=True)` uses it.

The checkpoint is a plain model of its family with N times the experts. In place of its gate, the two-level router lets the original
gate pick its top-K experts, ranks their K * N sub-experts by (expert's weight) x (sub-expert's predicted contribution), and runs the
best k, each with the weight of its expert. At k = K * N that is the original model.
"""

import os

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import cached_file

ROUTER_FILE = "sub_expert_router.safetensors"
_SMALLEST = 1e-6


class TwoLevelRouter(nn.Module):
    """Scores and picks sub-experts. Its tensors are buffers outside the state dict: saving the model saves the stock checkpoint.

    Args:
        original: the family's own router with the original rows, giving (logits, weights [T, K], expert indices [T, K]).
        sub_experts: N.
        kind: 'linear' (tensors: weight [E, N, H], bias [E, N]) or 'proxy' (gate, up: [E, N, r, H]).
        tensors: of the sub-router.
        activation: the experts' gating function, for 'proxy'.
    """

    def __init__(self, original, sub_experts, kind, tensors, activation=None):
        super().__init__()
        for name, parameter in list(original.named_parameters(recurse=False)):
            delattr(original, name)
            original.register_buffer(name, parameter.detach(), persistent=False)
        self.original, self.sub_experts, self.kind, self.activation = original, sub_experts, kind, activation
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def contribution(self, hidden_states):
        """Predicted contribution of every sub-expert, float32 [T, E, N], for MoE inputs [T, H]."""
        if self.kind == "linear":
            rows = F.linear(hidden_states.float(), self.weight.float().flatten(0, 1), self.bias.float().flatten())
            return rows.view(-1, *self.bias.shape)
        gate, up = (F.linear(hidden_states, rows.flatten(0, 2)) for rows in (self.gate, self.up))
        activations = self.activation(torch.cat([gate, up], dim=-1))
        return activations.abs().float().view(-1, *self.gate.shape[:3]).mean(-1)

    def forward(self, hidden_states, k):
        """Pick the k best sub-experts of each token.

        Args:
            hidden_states: MoE inputs [..., H].
            k: sub-experts per token, at most K * N.

        Returns:
            (weights [T, k], indices int64 [T, k]); the weights are divided by N because `down_proj` carries the factor N.
        """
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, experts = self.original(hidden_states)
        contribution = self.contribution(hidden_states).clamp_min(_SMALLEST)
        candidates = contribution.gather(1, experts[..., None].expand(-1, -1, self.sub_experts))
        rank = (weights.float()[..., None] * candidates).flatten(1)
        chosen = rank.topk(k, dim=-1).indices
        slot = chosen // self.sub_experts
        indices = experts.gather(1, slot) * self.sub_experts + chosen % self.sub_experts
        return weights.gather(1, slot) / self.sub_experts, indices


def _two_level_hook(gate, arguments, output):
    weights, indices = gate.two_level(arguments[0], gate.top_k)
    return output[0], weights, indices


def _original_gate(gate, config):
    """A router of the same class with the original number of experts; `config.prism` has the original sizes."""
    sizes = {key: getattr(config, key) for key in config.prism["source"]}
    for key, value in config.prism["source"].items():
        setattr(config, key, value)
    try:
        return type(gate)(config).to(device=gate.weight.device, dtype=gate.weight.dtype)
    finally:
        for key, value in sizes.items():
            setattr(config, key, value)


def _gate_neuron_rows(experts, neurons):
    """Rows of the gate neurons [E, N, r], which are positions inside each sub-expert, as (gate, up), each [E, N, r, H]."""
    width = experts.gate_up_proj.shape[1] // 2
    rows = experts.gate_up_proj.detach().view(*neurons.shape[:2], 2 * width, -1)
    index = neurons.to(rows.device)[..., None].expand(-1, -1, -1, rows.shape[-1])
    return {"gate": rows.gather(2, index), "up": rows.gather(2, index + width)}


def attach_block(block, config, tensors):
    """Install the two-level router on one MoE block (with `gate` and `experts`) of a refactored model.

    Args:
        block: the MoE block, weights loaded.
        config: the refactored model's config.
        tensors: the block's entries of the router file: original.*, weight, bias, gate_neurons.
    """
    kind, gate = config.prism["router"], block.gate
    original = _original_gate(gate, config)
    original.load_state_dict({name.removeprefix("original."): value for name, value in tensors.items() if name.startswith("original.")})
    if kind == "linear":
        parts = {name: tensors[name].to(gate.weight.device) for name in ("weight", "bias")}
    else:
        parts = _gate_neuron_rows(block.experts, tensors["gate_neurons"])
    gate.two_level = TwoLevelRouter(original, config.prism["sub_experts"], kind, parts, block.experts._apply_gate)
    gate.register_forward_hook(_two_level_hook)


def router_tensors(path):
    """The router file as {gate's module name: {tensor name: tensor}}."""
    blocks = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
            gate, _, leaf = name.partition(".gate.")
            blocks.setdefault(gate, {})[leaf] = file.get_tensor(name)
    return blocks


def attach(model, folder):
    """Install two-level routing on a refactored model that transformers has loaded; returns the model.

    Args:
        model: from `AutoModelForCausalLM.from_pretrained(folder)`.
        folder: the refactored checkpoint.

    Raises:
        ValueError: not a refactored model, or one written with `--router replicate`, which has no sub-router.
    """
    recipe = getattr(model.config, "prism", None)
    if not recipe or recipe["router"] == "replicate":
        raise ValueError(f"{folder}: has no sub-expert router to attach; refactor with --router linear or proxy")
    for name, tensors in router_tensors(os.path.join(folder, ROUTER_FILE)).items():
        attach_block(model.get_submodule(name), model.config, tensors)
    set_active(model, getattr(model.config, recipe["top_k"]))
    return model


def set_active(model, k):
    """Run a refactored model, stock or two-level, with k sub-experts per token from now on.

    Raises:
        ValueError: k is not between 1 and N times the original top-k.
    """
    recipe = model.config.prism
    most = recipe["sub_experts"] * recipe["source"][recipe["top_k"]]
    if not 1 <= k <= most:
        raise ValueError(f"{k} active sub-experts: choose 1 to {most}")
    setattr(model.config, recipe["top_k"], k)
    for module in model.modules():
        if isinstance(getattr(module, "gate", None), nn.Module) and isinstance(getattr(module, "experts", None), nn.Module):
            module.gate.top_k = k


class PrismForCausalLM(PreTrainedModel):
    """Entry point of `from_pretrained(folder, trust_remote_code=True)`: the family's own class with two-level routing attached."""

    @classmethod
    def from_pretrained(cls, folder, *args, config, **kwargs):
        """As any `from_pretrained`; a checkpoint written with `--router replicate` has no sub-router and comes back stock."""
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(folder, *args, config=config, **kwargs)
        if config.prism["router"] == "replicate":
            return model
        hub = {
            key: kwargs[key]
            for key in ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
            if key in kwargs
        }
        return attach(model, os.path.dirname(cached_file(folder, ROUTER_FILE, **hub)))
