"""What stands in for dropped sub-experts, as fitted in closed form."""

import pytest
import torch

from prism_refactor.routing.compensation import _Accumulator, map_rank

FEATURES, HIDDEN, TOKENS = 6, 12, 400


def accumulated(seed=0, scales=1.0):
    """An accumulator that was told of random tokens at one number of kept sub-experts, and what it was told."""
    random = torch.Generator().manual_seed(seed)
    features = torch.rand(1, TOKENS, FEATURES, generator=random)
    inputs = torch.randn(TOKENS, HIDDEN, generator=random) * scales
    kept = torch.randn(1, TOKENS, HIDDEN, generator=random)
    amounts = features[..., FEATURES // 2 :].sum(-1, keepdim=True)
    map_ = torch.randn(HIDDEN, HIDDEN, generator=random) / torch.as_tensor(scales)[..., None]
    # Few directions carry most of it.
    map_[:, 4:] *= 0.05
    missing = features @ torch.randn(FEATURES, HIDDEN, generator=random) + amounts * (inputs @ map_)
    accumulator = _Accumulator(FEATURES, HIDDEN, 1)
    for part in torch.arange(TOKENS).split(150):
        accumulator.add(features[:, part], inputs[part], kept[:, part], missing[:, part])
    return accumulator, (features[0], inputs, amounts[0], kept[0], missing[0])


def error(solved, told):
    vectors, map_in, map_out, factors = solved
    features, inputs, amounts, kept, missing = told
    found = features @ vectors + amounts * (inputs @ map_in.T @ map_out.T) + (factors - 1) * kept
    return ((found - missing).square().sum() / missing.square().sum()).item()


def test_what_can_be_explained_is():
    accumulator, told = accumulated()
    assert error(accumulator.solve(HIDDEN), told) < 1e-3


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_no_other_directions_of_its_rank_are_better(rank):
    accumulator, told = accumulated()
    ours = error(accumulator.solve(rank), told)
    assert error(accumulator.solve(rank + 1), told) < ours
    features, inputs, amounts, _, missing = told
    random = torch.Generator().manual_seed(1)
    for _ in range(20):
        directions = torch.linalg.qr(torch.randn(HIDDEN, rank, generator=random)).Q
        # The best for these: each of them is explained as well as it can be, and the vectors explain the rest.
        both = torch.cat([features, amounts * inputs], 1)
        along = both @ torch.linalg.lstsq(both, missing @ directions).solution @ directions.T
        rest = missing - missing @ directions @ directions.T
        beside = features @ torch.linalg.lstsq(features, rest).solution
        theirs = ((along + beside - missing).square().sum() / missing.square().sum()).item()
        assert ours < theirs


def test_inputs_of_very_different_sizes_are_told_apart():
    scales = torch.logspace(-2, 2, HIDDEN)
    accumulator, told = accumulated(scales=scales)
    assert error(accumulator.solve(HIDDEN), told) < 1e-3


def test_a_sub_expert_that_is_never_dropped_gives_nothing():
    accumulator, _ = accumulated()
    accumulator.gram[1], accumulator.gram[:, 1], accumulator.missing[1] = 0, 0, 0
    accumulator.kept[:, 1] = 0
    vectors, *_ = accumulator.solve(3)
    assert vectors[1].abs().max() < 1e-9
    assert torch.isfinite(vectors).all()


@pytest.mark.parametrize(
    ("arguments", "rank"), [((576, 1536, 1), 72), ((2048, 1024, 8), 384), ((4096, 14336, 2), 1344), ((64, 4096, 2), 32), ((64, 8, 1), 1)]
)
def test_the_map_costs_a_32nd_of_the_experts(arguments, rank):
    assert map_rank(*arguments) == rank
    hidden, neurons, top_k = arguments
    assert 4 * hidden * rank <= max(1.02 / 32 * 6 * hidden * neurons * top_k, 4 * hidden)
