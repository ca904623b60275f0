"""Two-level routing for a refactored Mixture-of-Experts checkpoint. Needs torch, transformers and safetensors, nothing else.

This file is copied into every refactored checkpoint, where `from_pretrained(folder, trust_remote_code=True)` uses it.

The checkpoint is a plain model of its family with N times the experts. In place of its gate the original one picks its top-K experts; the
two-level router ranks their K * N sub-experts by (expert's weight) x (sub-expert's predicted size), and runs the best k, each with the
weight of its expert. Where the checkpoint has a compensation, what the others are expected to add is added in their place, and the kept
output is rescaled. At k = K * N that is the original model.

Where a family cannot be that in its own classes, the checkpoint is the original with each expert's neurons in another order; its experts
are cut here, in memory, and its router is left as it is.
"""

import copy
import functools
import itertools
import math
import os
import shutil

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.utils import cached_file

ROUTER_FILE = "sub_expert_router.safetensors"
MANIFEST_FILE = "prism.json"
MODELING_FILE = "modeling_prism.py"
_SMALLEST = 1e-30
# See `TwoLevelRouter.need`.
RELATIVE = 0.75
# See `product`: at most so many rows, and at least so many numbers in the matrix.
FEW_ROWS, LARGE_MATRIX = 8, 2**17
# Keys of a config that models run by where they are not asked for otherwise, and what they mean for one that is to give logits and no more.
PLAIN = {
    "output_router_logits": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
    "use_cache": True,
    "is_encoder_decoder": False,
}
ROUTER_NAMES = ("gate", "router")


class TwoLevelRouter(nn.Module):
    """Scores and picks sub-experts. Its tensors are buffers outside the state dict, so saving the model saves the stock checkpoint;
    the router's file is copied beside it, see `attach`.

    Args:
        original: the family's own router with the original rows, giving (logits, weights [T, K], expert indices [T, K], ...). None where
            the model has it.
        num_experts: E, of the original.
        sub_experts: N.
        factor: what `down_proj` is multiplied with; the weights are divided by it.
        kind: how sizes are predicted, see `tensors`.
        tensors: of the sub-router. 'linear': weight [E, N, H], bias [E, N], ceiling [E, N]; compensation [2, E, N, H], map_in [R, H]
            and map_out [H, R], see `expected`; scale [K * N], of what is kept. 'proxy', the paper's gate neurons: their rows
            [E, N, 2r, H] as the experts hold them, and row_bias [E, N, 2r] where those have biases. Of both: threshold [K * N], see
            `k_within`. Where the family corrects scores by a tensor outside its router: correction [E].
        activation: see `activation_of`, for the proxy.
        groups: see `places`.
    """

    def __init__(self, original, num_experts, sub_experts, factor, kind, tensors, activation=None, groups=1):
        super().__init__()
        for module in original.modules() if original is not None else ():
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                delattr(module, name)
                module.register_buffer(name, value.detach(), persistent=False)
        self.original, self.num_experts, self.sub_experts, self.factor = original, num_experts, sub_experts, factor
        self.kind, self.activation = kind, activation
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.groups = groups
        if groups > 1:
            self.register_buffer("places", places(num_experts, sub_experts, groups).flatten().to(_device(original)), persistent=False)
        # Where sub-experts may be left out for another reason than their rank (offloading): told (indices [T, K * N], best first, k of
        # each token [T]), gives None or (positions [T, K * N] in the order to prefer, k of each token).
        self.choose = None

    def _apply(self, fn, recurse=True):
        """As any module's, which moves and converts it: but its tensors keep their types, in which its sums are made."""
        own = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in own.items():
            if self._buffers[name].dtype != value.dtype:
                self._buffers[name] = value.to(self._buffers[name].device)
        return self

    def log_size(self, hidden_states, experts):
        """Predicted log size of the output of each chosen expert's sub-experts: float32 [T, K, N] for inputs [T, H], experts [T, K]."""
        if self.kind == "linear":
            rows = product(hidden_states.float(), self.weight.float().flatten(0, 1), self.bias.float().flatten())
            predicted = torch.minimum(rows.view(-1, *self.bias.shape), self.ceiling)
            return predicted.gather(1, experts[..., None].expand(-1, -1, self.sub_experts))
        predicted = torch.empty(*experts.shape, self.sub_experts, device=experts.device)
        for expert in range(len(self.rows)):
            tokens, slots = torch.where(experts == expert)
            if len(tokens):
                predicted[tokens, slots] = self._proxy(hidden_states[tokens], expert)
        return predicted

    def _proxy(self, inputs, expert):
        bias = self.row_bias[expert].flatten().to(inputs.dtype) if hasattr(self, "row_bias") else None
        both = F.linear(inputs, self.rows[expert].flatten(0, 1).to(inputs.dtype), bias)
        magnitude = self.activation(both.unflatten(-1, self.rows.shape[1:3])).abs().float()
        return magnitude.mean(-1).clamp_min(_SMALLEST).log()

    def route(self, hidden_states, *others, **named):
        """What the original router gives, in the place of the stock one: (logits, weights [T, K], experts int64 [T, K], ...)."""
        if hasattr(self, "correction"):
            # In the place of the stock one's.
            others = (self.correction, *others[1:])
        return self.original(hidden_states, *others, **named)

    def rank(self, hidden_states, weights, experts):
        """The value by which sub-experts are ranked: log of weight x predicted size, float32 [T, K * N].

        Args:
            hidden_states: MoE inputs [T, H].
            weights: [T, K], of the original routing.
            experts: int64 [T, K], which it chose.
        """
        value = self.log_size(hidden_states, experts) + weights.float().clamp_min(_SMALLEST).log()[..., None]
        return value.flatten(1)

    @staticmethod
    def need(value):
        """How much a token needs each of its sub-experts, float32 [T, K * N], see `k_within`.

        The value against that of all of the token's together, log of weight x predicted size, but for a part: a token of large outputs
        runs a few more. On other text than the calibration's all outputs may be smaller or larger.

        Args:
            value: `rank` of its sub-experts.
        """
        return value - RELATIVE * value.logsumexp(1, keepdim=True)

    def k_within(self, value, budget):
        """How many sub-experts each token runs at a budget, int64 [T]: those whose need is above its threshold, at least one.

        Args:
            value: `rank` of its sub-experts, float32 [T, K * N].
            budget: the share of them that runs on average over tokens, one for all or float32 [T]; below 1 / (K * N) it is that.
        """
        last = value.shape[1] - 1
        # Of one dimension: an index of none would wait for the device.
        place = (torch.as_tensor(budget, dtype=torch.float32, device=value.device).view(-1) * value.shape[1] - 1).clamp(0, last)
        before = place.long()
        threshold = torch.lerp(self.threshold[before], self.threshold[(before + 1).clamp(max=last)], place - before)
        return (self.need(value) > threshold[:, None]).sum(1).clamp(min=1)

    def forward(self, hidden_states, weights, experts, k, token_k=None, budget=None):
        """Pick the k best sub-experts of each token.

        Args:
            hidden_states: MoE inputs [T, H].
            weights: [T, K], of the original routing.
            experts: int64 [T, K], which it chose.
            k: sub-experts per token, at most K * N.
            token_k: int64 [T], where tokens differ: the sub-experts of each, 1 to k. A token with fewer than k has the number of
                sub-experts as index, with weight 0, in its other slots, which are not to be run.
            budget: in place of both, see `k_within`; where tokens differ float32 [T], 0 for a token that runs its `token_k`.

        Returns:
            (weights [T, k], indices int64 [T, k], what the other sub-experts are expected to add [T, H] or None). The weights are divided
            by the factor that `down_proj` carries.

        Raises:
            ValueError: `token_k` does not hold one number per token.
        """
        if token_k is not None and len(token_k) != len(hidden_states):
            raise ValueError(f"{len(token_k)} numbers of sub-experts for {len(hidden_states)} tokens; give one for each token")
        most = experts.shape[1] * self.sub_experts
        everything = k == most and token_k is None and budget is None
        if everything and self.choose is None:
            return self._everything(weights, experts)
        value = self.rank(hidden_states, weights, experts)
        if budget is not None:
            within = self.k_within(value, budget)
            token_k = within if token_k is None else torch.where(budget > 0, within, token_k)
            k = int(token_k.max())
        compensated = hasattr(self, "compensation")
        order = value.topk(most if compensated or self.choose is not None else k, dim=-1).indices
        slots = order // self.sub_experts
        numbers = experts.gather(1, slots) * self.sub_experts + order % self.sub_experts
        indices = self._placed(numbers)
        if self.choose is not None:
            asked = token_k if token_k is not None else torch.full(order.shape[:1], k, device=order.device)
            chosen = self.choose(indices, asked)
            if chosen is not None:
                positions, token_k = chosen
                order, numbers, indices, slots = (part.gather(1, positions) for part in (order, numbers, indices, slots))
            elif everything:
                return self._everything(weights, experts)
        shares = weights.gather(1, slots)
        if token_k is not None:
            return self._ragged(hidden_states, k, token_k, value.gather(1, order), (numbers, indices), shares)
        kept, missing = shares[:, :k] / self.factor, None
        if compensated:
            size = value.gather(1, order[:, k:]).exp()
            missing = self.expected(hidden_states, numbers[:, k:], shares[:, k:], size).to(hidden_states.dtype)
            kept = (kept * self.scale[k - 1]).to(weights.dtype)
        return kept, indices[:, :k], missing

    def _everything(self, weights, experts):
        """The end of `forward` at full k, from the original routing."""
        numbers = experts[..., None] * self.sub_experts + torch.arange(self.sub_experts, device=experts.device)
        return weights.repeat_interleave(self.sub_experts, 1) / self.factor, self._placed(numbers.flatten(1)), None

    def _placed(self, numbers):
        """Where the experts module holds sub-experts that are numbered e N + n."""
        return self.places[numbers] if self.groups > 1 else numbers

    def _ragged(self, hidden_states, k, token_k, value, chosen, shares):
        """The end of `forward` for tokens with a k each, best sub-expert first; chosen: (numbers, indices), all [T, k or all]."""
        numbers, indices = chosen
        own = token_k[:, None]
        dropped = torch.arange(indices.shape[1], device=indices.device) >= own
        kept, missing = shares[:, :k] / self.factor, None
        if hasattr(self, "compensation"):
            absent = shares.float() * dropped, value.exp() * dropped
            missing = self.expected(hidden_states, numbers, *absent).to(hidden_states.dtype)
            whole = own == len(self.scale)
            kept = torch.where(whole, kept, (kept * self.scale[own - 1]).to(kept.dtype))
        skipped = self.num_experts * self.sub_experts
        return kept.masked_fill(dropped[:, :k], 0), indices[:, :k].masked_fill(dropped[:, :k], skipped), missing

    def expected(self, hidden_states, numbers, shares, size):
        """Expected output of sub-experts e N + n that do not run.

        Args:
            hidden_states: MoE inputs [T, H].
            numbers: int64 [T, m], the sub-experts.
            shares: weights of their experts [T, m]; 0 for one that runs.
            size: float32 [T, m], weight x predicted size; 0 for one that runs.

        Returns:
            sum of share x (mean output) + size x (mean direction + map_out (map_in x)), float32 [T, H].
        """
        mean, direction = self.compensation.flatten(1, 2)
        constant = F.embedding_bag(numbers, mean, per_sample_weights=shares.float(), mode="sum")
        found = constant + F.embedding_bag(numbers, direction, per_sample_weights=size, mode="sum")
        if not hasattr(self, "map_in"):
            return found
        return found + size.sum(1, keepdim=True) * product(product(hidden_states.float(), self.map_in), self.map_out)


def product(rows, matrix, bias=None):
    """Rows [n, inputs] times a matrix [outputs, inputs], [n, outputs], as F.linear does.

    Where MKL multiplies few float32 rows with a large matrix, the matrix comes first, which takes a third to all of the time. It multiplies
    a matrix and one column on one core, so the matrix is cut for as many cores as divide its rows. See docs/measurements.md, "One block,
    split".
    """
    few, large = rows.shape[0] <= FEW_ROWS, matrix.numel() >= LARGE_MATRIX
    by_mkl = rows.dtype == torch.float32 and rows.device.type == "cpu" and torch.backends.mkl.is_available()
    if not (by_mkl and few and large) or torch.compiler.is_compiling():
        return F.linear(rows, matrix, bias)
    if rows.shape[0] == 1:
        parts = math.gcd(matrix.shape[0], torch.get_num_threads())
        columns = torch.bmm(matrix.unflatten(0, (parts, -1)), rows.T.expand(parts, -1, -1)).flatten(0, 1)
    else:
        columns = matrix @ rows.T
    found = columns.T.contiguous()
    return found if bias is None else found + bias


class ActiveK:
    """How many sub-experts the tokens of a model run: its `prism_active`, which the two-level routers of all its layers read.

    Attributes:
        per_layer: k of each MoE layer; where tokens differ, the largest.
        per_token: int64 [T], k of each token of the next forward; None: all tokens run `per_layer`.
        budget: the share of sub-experts that tokens run on average, in the place of both; float32 [T], where tokens differ, 0 for those
            that run `per_token`; None: they run `per_layer` or `per_token`.
        has_thresholds: whether tokens can run within budgets; `install` notes it.
        ran: None; or, set to 0 before a forward, how many sub-experts each of its tokens ran in all layers together, int64 [T].
    """

    def __init__(self, per_layer, per_token=None, budget=None):
        self.has_thresholds = False
        self.set(per_layer, per_token, budget)

    def set(self, per_layer, per_token=None, budget=None):
        """Change all of it, and count no more."""
        self.per_layer, self.per_token, self.ran = list(per_layer), per_token, None
        # A budget of all is the largest k, and then nothing is ranked.
        self.budget = None if isinstance(budget, (int, float)) and budget == 1 else budget

    def of_layer(self, layer):
        """What the two-level router of a layer is told: (k, k of each token, budget)."""
        return self.per_layer[layer], self.per_token, self.budget


def _two_level_forward(experts, forward, active, layer, hidden_states, top_k_index, top_k_weights):
    """The forward of an experts module with two-level routing, which is given what the original router chose."""
    weights, indices, missing = experts.two_level(hidden_states, top_k_weights, top_k_index, *active.of_layer(layer))
    if active.ran is not None:
        active.ran = active.ran + (indices < experts.num_experts).sum(1)
    if (active.per_token is None and active.budget is None) or _skips_dropped(experts):
        output = forward(hidden_states, indices, weights)
    else:
        output = _run_kept(experts, forward, hidden_states, indices, weights)
    return output if missing is None else output + missing.view_as(output)


def _skips_dropped(experts):
    """Whether what runs an experts module passes over slots whose index is its number of experts: this project's do."""
    # Llama 4's have no config.
    own = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    return str(getattr(experts, "prism_implementation", own)).startswith("prism")


def _run_kept(experts, forward, hidden_states, indices, weights):
    """The output of experts without the slots that tokens drop, as rows of one expert each."""
    tokens, slots = torch.where(indices < experts.num_experts)
    rows = forward(hidden_states[tokens], indices[tokens, slots, None], weights[tokens, slots, None])
    return torch.zeros_like(hidden_states).index_add_(0, tokens, rows.to(hidden_states.dtype))


def _original_router(router, config, state):
    """A router of the same class with the original number of experts and tensors, in the types of the one it stands for."""
    # A copy, for some routers look at it when they run.
    config = copy.copy(config)
    for key, value in config.prism["source"].items():
        setattr(config, key, value)
    original = type(router)(config)
    original.load_state_dict({name: state[name].to(own.device, own.dtype) for name, own in router.state_dict().items()}, assign=True)
    return original.eval()


def places(experts, sub_experts, groups=1):
    """Where the experts module of a refactored model holds each sub-expert: int64 [E, N].

    Sub-expert n of expert e is number e N + n, and lies there: but where the family's router chooses among groups of experts, every group
    of J experts becomes N groups, the first of which has the first sub-experts of the J.
    """
    numbers = torch.arange(experts * sub_experts)
    return numbers.view(groups, sub_experts, -1).transpose(1, 2).reshape(experts, sub_experts) if groups > 1 else numbers.view(experts, -1)


def cut(experts, sub_experts):
    """Cut each expert of a module into equal sub-experts of neurons that follow each other: E * N experts in the place of E.

    Its state dict is as it was.
    """
    experts.num_experts *= sub_experts
    for name, value in [*experts.named_parameters(recurse=False)]:
        setattr(experts, name, nn.Parameter(_cut_all(experts, name, value.data, sub_experts), requires_grad=value.requires_grad))
    experts.register_state_dict_post_hook(functools.partial(_joined, sub_experts))
    experts.register_load_state_dict_pre_hook(functools.partial(_cut_state, sub_experts))


def cut_tensor(experts, name, whole, sub_experts):
    """Cut one expert's part of a tensor of an experts module into those of its sub-experts, [N, ...]; all N add its output's bias once."""
    if name == "down_proj_bias":
        return (whole / sub_experts).expand(sub_experts, -1)
    turned = _flag(experts, "is_transposed") and whole.ndim == 2
    rows = whole.T if turned else whole
    if name == "down_proj":
        parts = rows.unflatten(1, (sub_experts, -1)).transpose(0, 1)
    else:
        # Rows of gate and up, one after the other or in turns; or one kind of row.
        kinds = 2 if name.startswith("gate_up") and _flag(experts, "is_concatenated") else 1
        parts = rows.unflatten(0, (kinds, sub_experts, -1)).transpose(0, 1).flatten(1, 2)
    return parts.transpose(1, 2) if turned else parts


def _cut_all(experts, name, value, sub_experts):
    """`cut_tensor` of all experts, [E * N, ...], an expert at a time: what is cut is a copy."""
    held = None
    for expert, whole in enumerate(value):
        parts = cut_tensor(experts, name, whole, sub_experts)
        if held is None:
            held = parts.new_empty(len(value) * sub_experts, *parts.shape[1:])
        held[expert * sub_experts : (expert + 1) * sub_experts] = parts
    return held


def _cut_state(sub_experts, experts, state, prefix, *_):
    """Cut the tensors of an experts module in a state dict that is loaded."""
    for name, _ in experts.named_parameters(recurse=False):
        if prefix + name in state:
            state[prefix + name] = _cut_all(experts, name, state[prefix + name], sub_experts)


def _joined(sub_experts, experts, state, prefix, _):
    """Put tensors that `cut` has cut together again, in a state dict."""
    for name, _ in experts.named_parameters(recurse=False):
        parts = state[prefix + name].unflatten(0, (-1, sub_experts))
        if name == "down_proj_bias":
            state[prefix + name] = parts.sum(1)
            continue
        turned = _flag(experts, "is_transposed") and parts.ndim == 4
        rows = parts.transpose(2, 3) if turned else parts
        if name == "down_proj":
            whole = rows.transpose(1, 2).flatten(2, 3)
        else:
            kinds = 2 if name.startswith("gate_up") and _flag(experts, "is_concatenated") else 1
            whole = rows.unflatten(2, (kinds, -1)).transpose(1, 2).flatten(1, 3)
        state[prefix + name] = (whole.transpose(1, 2) if turned else whole).contiguous()


def inner_projection(experts):
    """What an experts module calls the matrix that its inputs are multiplied with."""
    return "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"


def activation_of(experts):
    """What an experts module makes of the products with that matrix: the activations of its neurons."""
    return experts._apply_gate if hasattr(experts, "gate_up_proj") else experts.act_fn


def _flag(experts, name):
    """Whether an experts module has biases, or stores matrices turned, or gate before up: as transformers says, where it says it."""
    return getattr(experts, name, name == "is_concatenated")


def _gate_neuron_rows(experts, neurons, groups):
    """Rows of the gate neurons [E, N, r], which are positions inside each sub-expert, in the order of the experts' own: [E, N, 2r, H].

    Of experts without a gate [E, N, r, H].
    """
    inner = inner_projection(experts)
    rows = getattr(experts, inner).detach()
    rows = rows.transpose(1, 2) if _flag(experts, "is_transposed") else rows
    neurons = neurons.to(rows.device)
    held = places(*neurons.shape[:2], groups).to(rows.device)
    index = neurons
    if inner == "gate_up_proj":
        # A neuron's gate and up rows are C / N apart, or neighbours.
        index = torch.cat([neurons, neurons + rows.shape[1] // 2], -1)
        if not _flag(experts, "is_concatenated"):
            index = torch.stack([2 * neurons, 2 * neurons + 1], -1).flatten(2)
    found = {"rows": rows[held].gather(2, index[..., None].expand(-1, -1, -1, rows.shape[-1]))}
    if _flag(experts, "has_bias"):
        found["row_bias"] = getattr(experts, f"{inner}_bias").detach()[held].gather(2, index)
    return found


def two_level_router(block, config, tensors):
    """The two-level router of one MoE block (with a router and `experts`, weights loaded) of a refactored model.

    Args:
        block: the MoE block; its experts are cut where the checkpoint holds them whole and this was not done before.
        config: the refactored model's config.
        tensors: the block's entries of the router file.
    """
    config = config.get_text_config()
    router, recipe = router_of(block), config.prism
    if not recipe.get("stock", True) and block.experts.num_experts == recipe["source"][(recipe.get("keys") or [*recipe["source"]])[0]]:
        cut(block.experts, recipe["sub_experts"])
    groups = recipe.get("groups", 1)
    state = {name.removeprefix("original."): value for name, value in tensors.items() if name.startswith("original.")}
    # Of what is in memory, whoever loads which part.
    device = _device(router if state else block.experts)
    parts = {name: value.to(device) for name, value in tensors.items() if name in _SUB_ROUTER}
    if "gate_neurons" in tensors:
        parts |= _gate_neuron_rows(block.experts, tensors["gate_neurons"], groups)
    original, experts = _original_router(router, config, state) if state else None, block.experts.num_experts // recipe["sub_experts"]
    activation = activation_of(block.experts)
    return TwoLevelRouter(original, experts, recipe["sub_experts"], recipe["factor"], recipe["router"], parts, activation, groups)


def _device(module):
    """Where a module's tensors are."""
    return next(itertools.chain(module.parameters(), module.buffers())).device


_SUB_ROUTER = ("weight", "bias", "ceiling", "compensation", "scale", "map_in", "map_out", "threshold", "correction")


def adopt_llama4(model):
    """Let the experts of Llama 4 models be given what other families' are: rows [T, H], experts [T, 1], weights [T, 1].

    Its own are given every row once for each expert, [E * T, H], times the router's score, which is 0 but for the chosen one.
    """
    for block in model.modules():
        if type(block).__name__ == "Llama4TextMoe" and block.top_k == 1 and not hasattr(block.experts, "is_transposed"):
            experts = block.experts
            experts.is_transposed, experts._apply_gate = True, functools.partial(_llama4_gate, experts)
            experts.forward = functools.partial(_llama4_experts, experts)
            block.forward = functools.partial(_llama4_block, block)


def _llama4_gate(experts, both):
    gate, up = both.chunk(2, dim=-1)
    return up * experts.act_fn(gate)


def _llama4_experts(experts, hidden_states, top_k_index, top_k_weights):
    output = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert < experts.num_experts:
            tokens, slots = torch.where(top_k_index == expert)
            rows = experts._apply_gate(hidden_states[tokens] @ experts.gate_up_proj[expert]) @ experts.down_proj[expert]
            output.index_add_(0, tokens, rows * top_k_weights[tokens, slots, None].to(rows.dtype))
    return output


def _llama4_block(block, hidden_states):
    rows = hidden_states.reshape(-1, block.hidden_dim)
    scores, logits = block.router(rows)
    score, chosen = scores.max(-1, keepdim=True)
    # The score is a factor of what an expert is given, not of what it gives.
    return block.shared_expert(rows) + block.experts(rows * score, chosen, torch.ones_like(score)), logits


def router_of(block):
    """The router of a MoE block, whatever its family calls it; None if there is none."""
    return next((module for name in ROUTER_NAMES if isinstance(module := getattr(block, name, None), nn.Module)), None)


def install(block, two_level, active, layer):
    """Let a two-level router route one MoE block: it takes its place in front of the experts, its original router that of the stock one.

    Args:
        block: the MoE block.
        two_level: its router.
        active: the model's `ActiveK`.
        layer: the block's number among the MoE blocks of the model.
    """
    experts = block.experts
    if hasattr(experts, "two_level"):
        uninstall(block)
    experts.two_level, active.has_thresholds = two_level, hasattr(two_level, "threshold")
    # Forwards of their own, as hooks of other libraries are.
    two_level.replaced = experts.__dict__.get("forward"), router_of(block).__dict__.get("forward")
    experts.forward = functools.partial(_two_level_forward, experts, experts.forward, active, layer)
    if two_level.original is not None:
        router_of(block).forward = two_level.route


def uninstall(block):
    """Undo `install`: the family's own router routes the block again."""
    for module, forward in zip((block.experts, router_of(block)), block.experts.two_level.replaced, strict=True):
        module.__dict__.pop("forward", None)
        if forward is not None:
            module.forward = forward
    del block.experts.two_level


def router_tensors(path):
    """The router file as {MoE block's module name: {tensor name: tensor}}."""
    blocks = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
            # A router may have a part of that name.
            found = [parts for router in ROUTER_NAMES if (parts := name.partition(f".{router}."))[1]]
            if not found:
                raise LookupError(f"{name} is no tensor of a router")
            block, _, leaf = min(found)
            blocks.setdefault(block, {})[leaf] = file.get_tensor(name)
    return blocks


def run_plainly(config, keys=tuple(PLAIN)):
    """Let models of a config give logits and no more, whatever a training left in it; returns the config."""
    for part in {id(found): found for found in (config, config.get_text_config())}.values():
        for key in keys:
            if getattr(part, key, None) not in (PLAIN[key], None):
                setattr(part, key, PLAIN[key])
    return config


def attach(model, folder):
    """Install two-level routing on a refactored model that transformers has loaded; returns the model.

    Its `save_pretrained` copies the router's file from `folder`, which must still be there then.

    Args:
        model: from `AutoModelForCausalLM.from_pretrained(folder)`.
        folder: the refactored checkpoint.

    Raises:
        ValueError: not a refactored model, or one written with `--router replicate`, which has no sub-router; or the number of experts that
            the original's own router chooses was changed.
    """
    adopt_llama4(model)
    config = model.config.get_text_config()
    # A loss of the stock router's, which does not route here; and a form of outputs that transformers' models do not run with.
    run_plainly(model.config, ("output_router_logits", "return_dict"))
    recipe = getattr(config, "prism", None)
    if not recipe or recipe["router"] == "replicate":
        raise ValueError(f"{folder}: has no sub-expert router to attach; refactor it with the router 'linear' or 'proxy'")
    tensors, names = router_tensors(os.path.join(folder, ROUTER_FILE)), {id(module): name for name, module in model.named_modules()}
    blocks = moe_blocks(model)
    # As config.json says, or a caller of `from_pretrained`.
    k = getattr(config, recipe["top_k"])
    if not recipe.get("stock", True):
        if {*(k if isinstance(k, list) else [k])} != {recipe["source"][recipe["top_k"]]}:
            raise ValueError(f"{folder}: {recipe['top_k']} was changed, which this model's own router reads; use set_active in its place")
        k = full_k(config)
    model.prism_active = ActiveK([k] * len(blocks))
    for layer, block in enumerate(blocks):
        install(block, two_level_router(block, model.config, tensors[names[id(block)]]), model.prism_active, layer)
    model.save_pretrained = functools.partial(_save_with_router, model, os.path.abspath(folder))
    return model


def _save_with_router(model, folder, save_directory, is_main_process=True, *args, **kwargs):
    """A model's `save_pretrained`; what routes it by two levels, which its state dict does not have, is saved with it."""
    router = os.path.join(folder, ROUTER_FILE)
    if not os.path.isfile(router):
        raise OSError(f"{router} is gone, and the model would be saved without its router; save it before you remove that folder")
    if is_main_process:
        # First: saving may end with an upload.
        os.makedirs(save_directory, exist_ok=True)
        for source, name in ((router, ROUTER_FILE), (os.path.join(folder, MANIFEST_FILE), MANIFEST_FILE), (__file__, MODELING_FILE)):
            target = os.path.join(save_directory, name)
            if os.path.isfile(source) and not (os.path.exists(target) and os.path.samefile(source, target)):
                shutil.copyfile(source, target)
    type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)


def decoder_layers(model):
    """The list of decoder layers of a language model, perhaps inside a model of images and text; None where there is no such list."""
    decoder = model.get_decoder()
    # Llama 4's is a language model with a head.
    return getattr(decoder, "layers", None) or getattr(getattr(decoder, "model", None), "layers", None)


def moe_block(layer):
    """The (name, module) of a decoder layer's MoE block, recognised by its router and its `experts`; None in a dense layer."""
    for name, module in layer.named_modules():
        if isinstance(getattr(module, "experts", None), nn.Module) and router_of(module) is not None:
            return name, module
    return None


def moe_blocks(model):
    """A model's MoE blocks, in the order of its layers; not those of what encodes images."""
    found = [moe_block(layer) for layer in decoder_layers(model)]
    return [block for _, block in filter(None, found)]


def moe_gates(model):
    """The family's own routers of a model's MoE blocks, in the order of its layers."""
    return [router_of(block) for block in moe_blocks(model)]


def full_k(config):
    """Sub-experts per token at which a refactored model is the original: N times the original top-k."""
    recipe = config.get_text_config().prism
    return recipe["sub_experts"] * recipe["source"][recipe["top_k"]]


def set_active(model, k=None, budget=None):
    """Run a refactored model, stock or two-level, with k sub-experts per token, or within a budget, from now on.

    Args:
        model: the model.
        k: a number for all layers, or one number per MoE layer.
        budget: the share of the sub-experts that tokens run on average, above 0 and at most 1; a token runs more or fewer, as it needs, and
            at least one.

    Raises:
        ValueError: both or neither are given; k is not between 1 and N times the original top-k, or has not one number per MoE layer; the
            budget is no such share, or the model has no two-level routing with thresholds.
    """
    most, active = full_k(model.config), getattr(model, "prism_active", None)
    if (k is None) == (budget is None):
        raise ValueError("choose either k, a number of sub-experts, or a budget, the share of them that runs on average")
    if budget is not None:
        _check_budget(model, budget)
        k = most
    prism = model.config.get_text_config().prism
    if active is None and not prism.get("stock", True):
        raise ValueError("this model is the original without two-level routing; attach it first")
    gates = moe_gates(model) if active is None else []
    layers = len(gates or active.per_layer)
    per_layer = [k] * layers if isinstance(k, int) else list(k)
    if len(per_layer) != layers:
        raise ValueError(f"k of {len(per_layer)} layers does not fit a model of {layers} MoE layers")
    _check_k(per_layer, most)
    # transformers has one number: the largest, which is what its aux loss and other engines would size buffers by.
    if prism.get("stock", True):
        setattr(model.config.get_text_config(), prism["top_k"], max(per_layer))
    if active is not None:
        active.set(per_layer, budget=budget)
    for layer, gate in enumerate(gates):
        set_top_k(gate, prism["top_k"], per_layer[layer])


def _check_budget(model, budget):
    if not 0 < budget <= 1:
        raise ValueError(f"budget {budget}: choose a share above 0 and at most 1")
    if model.config.get_text_config().prism["router"] == "replicate":
        raise ValueError("a budget needs a sub-expert router, and this checkpoint has none; refactor with the router linear or proxy")
    if getattr(model, "prism_active", None) is None:
        raise ValueError("a budget needs two-level routing; attach it to the model first")
    if not model.prism_active.has_thresholds:
        raise ValueError("a budget needs thresholds, and this checkpoint was written before there were any; refactor it again")


def set_top_k(router, key, k):
    """Let a family's own router choose k experts; `key`: what its config calls that number."""
    if hasattr(router, "top_k"):
        router.top_k = k
    else:
        # A config of its own: layers may differ.
        router.config = copy.copy(router.config)
        setattr(router.config, key, k)


def set_token_active(model, token_k, budgets=None):
    """Run the tokens of the next forward passes of a model with two-level routing with a k of their own each, or within a budget.

    Args:
        model: the model.
        token_k: a list of numbers, 1 to `full_k`, one per token of the batch in the order in which MoE blocks see them.
        budgets: None, or as many shares, each below 1, of which 0 is a token that runs its k.

    Raises:
        ValueError: a number is out of range, or the model has no two-level routing, or no thresholds for a budget.
    """
    active = getattr(model, "prism_active", None)
    if active is None:
        raise ValueError("a k per token needs two-level routing; attach it to the model first")
    _check_k(token_k, full_k(model.config))
    most, given = max(token_k), any(budgets or ())
    for budget in {*(budgets or ())} - {0}:
        _check_budget(model, budget)
    # A batch of one k runs as if `set_active` had been called: nothing is ranked at full k, nothing is dropped.
    per_token = torch.tensor(token_k, device=model.device) if given or min(token_k) < most else None
    shares = torch.tensor(budgets, dtype=torch.float32, device=model.device) if given else None
    active.set([most] * len(active.per_layer), per_token, shares)


def _check_k(values, most):
    for value in values:
        if not 1 <= value <= most:
            raise ValueError(f"{value} active sub-experts: choose 1 to {most}")


def auto_class(config):
    """The auto class that loads a checkpoint: with its images where it takes images and text."""
    wraps = config.get_text_config() is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if wraps else AutoModelForCausalLM


def family_classes(config):
    """transformers' classes by their configs, of the kind of models that `auto_class` loads."""
    wraps = auto_class(config) is AutoModelForImageTextToText
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if wraps else MODEL_FOR_CAUSAL_LM_MAPPING


class PrismForCausalLM(PreTrainedModel):
    """Entry point of `from_pretrained(folder, trust_remote_code=True)`: the family's own class with two-level routing attached."""

    @classmethod
    def from_pretrained(cls, folder, *args, config, **kwargs):
        """As any `from_pretrained`; a checkpoint written with `--router replicate` has no sub-router and comes back stock."""
        model = family_classes(config)[type(config)].from_pretrained(folder, *args, config=config, **kwargs)
        if config.get_text_config().prism["router"] == "replicate":
            return model
        hub = {
            key: kwargs[key]
            for key in ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
            if key in kwargs
        }
        # The manifest, if there is one, is saved with the model.
        cached_file(folder, MANIFEST_FILE, **hub, _raise_exceptions_for_missing_entries=False)
        return attach(model, os.path.dirname(cached_file(folder, ROUTER_FILE, **hub)))
