"""Per-expert activation statistics of one MoE layer, collected while it runs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from prism_refactor.errors import InputError
from prism_refactor.models.experts import expert_activations, experts_forward
from prism_refactor.models.layered import dtype_name
from prism_refactor.models.transformers_models import ExpertsModule, FusedExperts, register_experts

OBSERVED = "prism_observed"
# Fewer routed tokens than this and an expert's partition rests on little; such experts are reported.
TOKEN_FLOOR = 64
# MoE inputs kept per layer, whatever their expert: what its routers are fitted and judged on.
INPUT_SAMPLE = 32_768
# Largest side of a co-activation picture.
PICTURE = 64
# k_a / C in the paper.
COACTIVE_SHARE = 0.75


def coactive_marks(activations: torch.Tensor, share: float = COACTIVE_SHARE) -> torch.Tensor:
    """The paper's binarised activations: 1 for each token's k_a = share x C largest |activations|; [B, C] -> float32 [B, C]."""
    magnitude = activations.abs().float()
    largest = magnitude.topk(max(1, round(share * magnitude.shape[1])), dim=1).indices
    return torch.zeros_like(magnitude).scatter_(1, largest, 1.0)


@dataclass
class LayerStatistics:
    """What calibration learned about one MoE layer: E experts of C neurons, hidden size H. All tensors on the CPU.

    Attributes:
        layer: index of the decoder layer.
        tokens_routed: int64 [E].
        activation_sum: float64 [E, C], |activation| summed over the routed tokens.
        fired: int64 [E, C], routed tokens whose |activation| exceeds the mean over the expert's neurons.
        inputs: [T, H], a uniform sample of at most `INPUT_SAMPLE` of the inputs of the layer's experts, in the compute dtype and in the
            order of the text.
        weights, experts: [T, K] and int64 [T, K], how the model routes these.
        activations: per expert, a uniform sample [B_e, C] of the routed tokens' activations in the compute dtype.
        sampled: per expert, int64 [B_e], the positions of those tokens in the text, rising.
        unrouted: experts that saw no token; their statistics come from running their weights on `inputs`.
    """

    layer: int
    tokens_routed: torch.Tensor
    activation_sum: torch.Tensor
    fired: torch.Tensor
    inputs: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor
    activations: list[torch.Tensor]
    sampled: list[torch.Tensor]
    unrouted: list[int] = field(default_factory=list)

    @property
    def mean_activation(self) -> torch.Tensor:
        """float32 [E, C], mean |activation| over an expert's tokens."""
        return (self.activation_sum / self._tokens()[:, None]).float()

    @property
    def firing_frequency(self) -> torch.Tensor:
        """float32 [E, C], share of an expert's tokens whose |activation| exceeds the mean over its neurons."""
        return (self.fired / self._tokens()[:, None]).float()

    def _tokens(self) -> torch.Tensor:
        """Those that the sums are over: the routed ones, or what stood in for them."""
        stand_ins = torch.tensor([len(sample) for sample in self.activations])
        return torch.where(self.tokens_routed > 0, self.tokens_routed, stand_ins)

    def coactivation(self, expert: int) -> torch.Tensor:
        """The paper's Co = B^T B: on how many sampled tokens two neurons are both marked, int32 [C, C]."""
        marks = coactive_marks(self.activations[expert])
        return (marks.T @ marks).to(torch.int32)

    def coactivation_picture(self, expert: int, share: float, order: torch.Tensor | None = None) -> torch.Tensor:
        """How often two neurons are both among a token's largest `share` of |activation|, relative to chance.

        Args:
            expert: whose.
            share: few show more than the paper's three quarters.
            order: int64 [C], neurons in another order than the stored one.

        Returns:
            float32 [P, P], P = min(C, `PICTURE`): means over blocks of neurons.
        """
        marks = coactive_marks(self.activations[expert], share)
        chance = marks.mean(0).clamp_min(1 / len(marks))
        together = (marks.T @ marks / len(marks)) / torch.outer(chance, chance)
        together.fill_diagonal_(1.0)
        if order is not None:
            together = together[order][:, order]
        return F.adaptive_avg_pool2d(together[None, None], min(PICTURE, len(together)))[0, 0]

    def fixed_quarter_share(self) -> float:
        """Mean over experts of the |activation| in the quarter of the neurons that is largest on average; see `top_quarter_share`."""
        ordered = self.mean_activation.sort(1, descending=True).values
        quarter = ordered[:, : max(1, ordered.shape[1] // 4)].sum(1)
        return (quarter / ordered.sum(1).clamp_min(1e-30)).mean().item()

    def top_quarter_share(self) -> float:
        """Median over sampled tokens and experts of the L1 mass in a token's largest quarter of neurons."""
        shares = []
        for activations in self.activations:
            magnitude = activations.abs().float()
            top = magnitude.topk(max(1, magnitude.shape[1] // 4), dim=1).values.sum(1)
            shares.append(top / magnitude.sum(1).clamp_min(1e-30))
        return torch.cat(shares).median().item()

    def below_floor(self) -> list[int]:
        """Experts with fewer routed tokens than `TOKEN_FLOOR`."""
        return torch.nonzero(self.tokens_routed < TOKEN_FLOOR).flatten().tolist()


class StatisticsSource(Protocol):
    """Statistics of a model's MoE layers in order: made while they are iterated (`Profile`), or read from a folder (`Statistics`).

    Attributes:
        recorded: the calibration, as JSON values for a manifest.
    """

    @property
    def recorded(self) -> dict[str, Any]:
        """The calibration."""

    def __iter__(self) -> Iterator[LayerStatistics]: ...

    def origin(self) -> str:
        """Return where the statistics come from, as far as it decides their bytes and `recorded` does not say it."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return what `restore` needs to go on after the last layer that was yielded."""

    def restore(self, state: dict[str, torch.Tensor], first: int) -> None:
        """Go on from a `state`, with layer `first`."""


def priorities(seed: int, layer: int, total_tokens: int) -> torch.Tensor:
    """Random priority of every token of the text in a layer, float64 [total_tokens]: a sample is the tokens of lowest priority."""
    return torch.from_numpy(np.random.default_rng([seed, layer]).random(total_tokens))


def _moments(activations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(|activation| summed, tokens that fired) of activations [n, C]: float64 [C], int64 [C]."""
    magnitude = activations.abs().float()
    return magnitude.sum(0, dtype=torch.float64), (magnitude > magnitude.mean(1, keepdim=True)).sum(0)


def merge_layers(parts: Iterable[LayerStatistics], priority: torch.Tensor, tokens_per_expert: int) -> LayerStatistics:
    """The statistics of one layer over a text from those over its shards, in their order: what one run over all of it would have found.

    Counts, sums and samples are the same; sums in float64 but for the order of their terms. Two parts are in memory at a time.

    Args:
        parts: of consecutive shards.
        priority: of the tokens of the whole text, see `priorities`.
        tokens_per_expert: size of each expert's sample.
    """
    merged: LayerStatistics | None = None
    for part in parts:
        if merged is None:
            merged = part
            continue
        for expert, (here, there) in enumerate(zip(merged.tokens_routed.tolist(), part.tokens_routed.tolist(), strict=True)):
            if bool(here) != bool(there):
                # What stood in for tokens gives way to them.
                chosen = merged if here else part
                merged.activation_sum[expert], merged.fired[expert] = chosen.activation_sum[expert], chosen.fired[expert]
                merged.activations[expert], merged.sampled[expert] = chosen.activations[expert], chosen.sampled[expert]
                continue
            merged.activation_sum[expert] += part.activation_sum[expert]
            merged.fired[expert] += part.fired[expert]
            tokens = torch.cat([merged.sampled[expert], part.sampled[expert]])
            activations = torch.cat([merged.activations[expert], part.activations[expert]])
            if len(tokens) > tokens_per_expert:
                # Stand-ins are the first of the inputs, sampled tokens those of lowest priority.
                rank = priority[tokens] if here else tokens
                kept = rank.topk(tokens_per_expert, largest=False).indices.sort().values
                tokens, activations = tokens[kept], activations[kept]
            merged.sampled[expert], merged.activations[expert] = tokens, activations
        merged.tokens_routed += part.tokens_routed
        for name in ("inputs", "weights", "experts"):
            setattr(merged, name, torch.cat([getattr(merged, name), getattr(part, name)]))
        del part
    assert merged is not None
    merged.unrouted = torch.nonzero(merged.tokens_routed == 0).flatten().tolist()
    for expert in merged.unrouted:
        merged.activation_sum[expert], merged.fired[expert] = _moments(merged.activations[expert])
    return merged


class LayerCollector:
    """Accumulates `LayerStatistics` while batches run through one MoE layer.

    Every token has a random priority fixed by the seed; a sample is the tokens of lowest priority. So the samples are uniform and do
    not depend on the batch size.

    Args:
        layer: index of the decoder layer.
        experts: its experts module, materialised.
        total_tokens: of the text.
        tokens_per_expert: B, size of each expert's sample.
        seed: of the sampling.
        first_token: position in the text of the first token that will pass.
    """

    def __init__(self, layer: int, experts: ExpertsModule, total_tokens: int, tokens_per_expert: int, seed: int, first_token: int = 0):
        self.layer, self.experts, self.tokens_per_expert = layer, experts, tokens_per_expert
        weight = experts.down_proj
        count, _, neurons = FusedExperts(experts).shape
        priority = priorities(seed, layer, total_tokens)
        self._priority = priority.to(weight.device)
        self._sampled_inputs = torch.zeros(total_tokens, dtype=torch.bool, device=weight.device)
        self._sampled_inputs[priority.argsort()[:INPUT_SAMPLE].to(weight.device)] = True
        # Of each batch: inputs, weights and experts of the sampled tokens.
        self._routed: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._first = self._seen = first_token
        self._count = [0] * count
        self._activation_sum = torch.zeros(count, neurons, dtype=torch.float64, device=weight.device)
        self._fired = torch.zeros(count, neurons, dtype=torch.int64, device=weight.device)
        self._sample: list[torch.Tensor] = [weight.new_empty(0, neurons) for _ in range(count)]
        self._sample_tokens = [torch.empty(0, dtype=torch.int64, device=weight.device) for _ in range(count)]

    def add(self, expert: int, tokens: torch.Tensor, _: torch.Tensor, activations: torch.Tensor) -> None:
        """Record one expert's share of a batch: token positions in the batch [n], its MoE inputs, activations [n, C]."""
        total, fired = _moments(activations)
        self._count[expert] += len(tokens)
        self._activation_sum[expert] += total
        self._fired[expert] += fired
        self._offer(expert, tokens + self._seen, activations)

    def _offer(self, expert: int, tokens: torch.Tensor, activations: torch.Tensor) -> None:
        """Keep the tokens of lowest priority among those held and those offered."""
        held = self._sample_tokens[expert]
        if len(held) == self.tokens_per_expert:
            admitted = self._priority[tokens] < self._priority[held].max()
            tokens, activations = tokens[admitted], activations[admitted]
            if len(tokens) == 0:
                return
        tokens = torch.cat([held, tokens])
        activations = torch.cat([self._sample[expert], activations])
        if len(tokens) > self.tokens_per_expert:
            chosen = self._priority[tokens].topk(self.tokens_per_expert, largest=False).indices
            tokens, activations = tokens[chosen], activations[chosen]
        self._sample_tokens[expert], self._sample[expert] = tokens, activations

    def end_batch(self, inputs: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> None:
        """Close a batch of MoE inputs [tokens, H], all of whose experts have been added; see `LayerStatistics` for the others."""
        window = self._sampled_inputs[self._seen : self._seen + len(inputs)]
        self._routed.append((inputs[window], weights[window], experts[window]))
        self._seen += len(inputs)

    @torch.no_grad()
    def finish(self) -> LayerStatistics:
        """The statistics. Experts that saw no token are run on the input sample, so that they have a partition too.

        Raises:
            InputError: activations overflowed or the weights are not finite.
        """
        inputs, weights, experts = map(torch.cat, zip(*self._routed, strict=True))
        self._routed = []
        unrouted = [expert for expert, count in enumerate(self._count) if count == 0]
        routed = torch.tensor(self._count)
        some = inputs[: self.tokens_per_expert]
        positions = torch.nonzero(self._sampled_inputs[self._first : self._seen]).flatten()[: len(some)] + self._first - self._seen
        for expert in unrouted:
            self.add(expert, positions, some, expert_activations(self.experts, expert, some))
        if not torch.isfinite(self._activation_sum).all():
            raise InputError(
                f"layer {self.layer}: activations are not finite in {dtype_name(inputs.dtype)}; check the weights of this "
                "layer and of those before it" + ("" if inputs.dtype == torch.float32 else ", or use `dtype` float32")
            )
        for expert, tokens in enumerate(self._sample_tokens):
            order = tokens.argsort()
            self._sample[expert], self._sample_tokens[expert] = self._sample[expert][order].cpu(), tokens[order].cpu()
        return LayerStatistics(
            layer=self.layer,
            tokens_routed=routed,
            activation_sum=self._activation_sum.cpu(),
            fired=self._fired.cpu(),
            inputs=inputs.cpu(),
            weights=weights.cpu(),
            experts=experts.cpu(),
            activations=self._sample,
            sampled=self._sample_tokens,
            unrouted=unrouted,
        )


def observed_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`models.experts.experts_forward`, telling `self.prism_collector` (if set) the activations as they come by."""
    collector: LayerCollector | None = getattr(self, "prism_collector", None)
    if collector is None:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)
    output = experts_forward(self, hidden_states, top_k_index, top_k_weights, collector.add)
    collector.end_batch(hidden_states, top_k_weights, top_k_index)
    return output


register_experts(OBSERVED, observed_experts_forward)
