"""The experts' forward: products by shape, tokens by expert, sums of rows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_refactor.models.experts import RowSums, by_expert
from prism_refactor.models.modeling_prism import FEW_ROWS, LARGE_MATRIX, product


@pytest.mark.parametrize(
    ("rows", "turned", "bias", "outputs"), itertools.product((1, 2, FEW_ROWS, FEW_ROWS + 1), (False, True), (False, True), (512, 513))
)
def test_products_of_every_shape_are_those_of_float64(rows, turned, bias, outputs):
    generator = torch.Generator().manual_seed(0)
    inputs, matrix = torch.randn(rows, 256, generator=generator), torch.randn(outputs, 256, generator=generator)
    if turned:
        matrix = matrix.T.contiguous().T
    added = torch.randn(outputs, generator=generator) if bias else None
    assert matrix.numel() >= LARGE_MATRIX
    found = product(inputs, matrix, added)
    assert found.is_contiguous()
    wanted = torch.nn.functional.linear(inputs.double(), matrix.double(), None if added is None else added.double())
    assert (found - wanted).abs().max() < 1e-4


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 6), st.randoms(use_true_random=False))
def test_every_slot_that_is_not_empty_comes_once_in_the_order_of_experts(tokens, k, experts, random):
    index = torch.tensor([random.sample(range(experts + 4), k) for _ in range(tokens)]).clamp(max=experts)
    values = torch.arange(tokens * k).view(tokens, k)
    found = by_expert(index, values, experts)
    assert [expert for expert, _, _ in found] == sorted({int(expert) for expert in index.flatten() if expert < experts})
    for expert, rows, own in found:
        assert [(int(row), int(value)) for row, value in zip(rows, own, strict=True)] == [
            (row, row * k + slot) for row in range(tokens) for slot in range(k) if index[row, slot] == expert
        ]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sets(st.integers(0, 3), min_size=1), max_size=8))
def test_parts_for_the_same_rows_and_for_others_add_up(parts):
    output, wanted = torch.zeros(4, 3), torch.zeros(4, 3)
    sums = RowSums(output)
    for number, rows in enumerate(map(sorted, parts)):
        values = torch.full((len(rows), 3), float(2**number))
        places = torch.tensor(rows)
        sums.add(places, values, sums.last_were(places))
        wanted[rows] += values
    assert torch.equal(sums.finish(), wanted)
