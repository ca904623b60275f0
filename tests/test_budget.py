"""Budgets: tokens run what they need, and a share of the sub-experts on average."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, FAST, load, logits
from safetensors.torch import load_file, save_file

import prism_refactor
from prism_refactor.calibration.settings import Calibration
from prism_refactor.errors import UsageError
from prism_refactor.evaluation.losses import Point, stream_losses
from prism_refactor.evaluation.windows import read_windows
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.modeling_prism import ROUTER_FILE, attach, moe_blocks, set_active, set_token_active
from prism_refactor.models.stream import ComputeOptions
from prism_refactor.offload.manager import load_offloaded
from prism_refactor.offload.options import CacheBudget
from prism_refactor.routing.budget import thresholds

TEXT = ["--num-tokens", "2000", "--max-seq-length", "128"]


def without_thresholds(folder):
    """Make a checkpoint what was written before there were budgets."""
    path = folder / ROUTER_FILE
    tensors = {name: value for name, value in load_file(path).items() if not name.endswith(".threshold")}
    save_file(tensors, path)
    return folder


def test_thresholds_keep_the_mean_that_was_asked_for():
    values = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (5000, 12))).float()
    found = thresholds(values)
    assert (found.diff() <= 0).all()
    for mean, threshold in enumerate(found, 1):
        # Tokens whose best is below the threshold run it all the same.
        ran = (values > threshold).sum(1).clamp(min=1)
        assert ran.double().mean() == pytest.approx(mean, abs=0.01)


@torch.inference_mode()
def test_tokens_run_what_is_above_the_threshold_and_one_at_least(elastic, token_ids):
    model = prism_refactor.load(elastic, budget=0.25)
    seen = []

    def look(router, arguments, output):
        hidden, weights, experts, k, token_k, budget = arguments
        assert (k, token_k, budget) == (16, None, 0.25)
        seen.append((router.need(router.rank(hidden, weights, experts)), output[1], router.threshold))

    for block in moe_blocks(model):
        block.experts.two_level.register_forward_hook(look)
    logits(model, token_ids)
    assert len(seen) == 4
    for need, indices, threshold in seen:
        ran = (indices != 64).sum(1)
        assert torch.equal(ran, (need > threshold[3]).sum(1).clamp(min=1))
        assert ran.min() < ran.max()


def test_outputs_of_another_size_change_numbers_little(elastic, token_ids):
    """As text of another kind has them: half or twice as large."""
    model = prism_refactor.load(elastic, budget=0.25).float()
    means = []
    for size in (0.5, 1, 2):
        for block in moe_blocks(model):
            router = block.experts.two_level
            router.bias.add_(math.log(size)), router.ceiling.add_(math.log(size))
        model.prism_active.ran = 0
        logits(model, token_ids)
        means.append(model.prism_active.ran.double().mean().item() / 4)
        for block in moe_blocks(model):
            router = block.experts.two_level
            router.bias.sub_(math.log(size)), router.ceiling.sub_(math.log(size))
    assert means[0] < means[1] < means[2]
    assert max(means) < 1.25 * means[1]
    assert min(means) > 0.75 * means[1]


def test_a_budget_of_all_is_the_whole_model_and_of_next_to_nothing_is_one_sub_expert(elastic, token_ids):
    model = prism_refactor.load(elastic)
    full = logits(model, token_ids)
    prism_refactor.set_active(model, budget=1)
    assert torch.equal(logits(model, token_ids), full)
    prism_refactor.set_active(model, budget=1e-6)
    ran = []
    for block in moe_blocks(model):
        block.experts.two_level.register_forward_hook(lambda _, __, output: ran.append((output[1] != 64).sum(1)))
    logits(model, token_ids)
    # Above the largest value of calibration that a token left out are only best ones, and a few others.
    assert 1 <= torch.cat(ran).double().mean() < 1.01


def test_an_answer_depends_on_its_own_tokens_only(elastic, token_ids):
    model = prism_refactor.load(elastic, budget=0.3)
    alone = torch.cat([logits(model, row[None]) for row in token_ids])
    torch.testing.assert_close(logits(model, token_ids), alone, atol=1e-4, rtol=0)


def test_a_number_of_sub_experts_takes_the_place_of_a_budget(elastic, token_ids):
    model = prism_refactor.load(elastic, k=4)
    expected = logits(model, token_ids)
    prism_refactor.set_active(model, budget=0.5)
    assert not torch.equal(logits(model, token_ids), expected)
    prism_refactor.set_active(model, 4)
    assert torch.equal(logits(model, token_ids), expected)


def test_it_loses_less_than_the_same_number_for_every_token(command, elastic):
    result = command("prism-eval", EXAMPLE, elastic, *TEXT, "--k", "4,8", "--budget", "0.25,50%", "--json")
    assert result.code == 0, result.err
    (curve,) = json.loads(result.out)["refactored"]
    for uniform, within, share in zip(curve["points"], curve["budgets"], (0.25, 0.5), strict=True):
        assert within["budget"] == share
        assert within["share"] == pytest.approx(share, rel=0.1)
        assert within["perplexity"] < uniform["perplexity"]
        assert within["cost"]["flops"] == pytest.approx(uniform["cost"]["flops"], rel=0.03)
    assert curve["budgets"][0]["recovered"] > curve["points"][0]["recovered"]


def test_what_is_printed_names_the_mean(command, elastic, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The Python standard library documents every module. " * 40)
    printed = command("prism-eval", EXAMPLE, elastic, "--dataset", text, "--max-seq-length", "64", "--k", "4", "--budget", "25%").out
    *_, budget = printed.split("within a budget")
    (row,) = [line for line in budget.splitlines() if " of 16" in line]
    assert float(row.split()[0]) != 4
    _, curve = prism_refactor.evaluate(EXAMPLE, elastic, k=[4], budgets=[0.25], datasets=(str(text),), max_seq_length=64)
    (point,) = curve.budgets
    assert f"{16 * point.share:.2f}" == row.split()[0]
    assert f"{point.perplexity:.2f}" in row


def test_streaming_runs_the_tokens_that_a_model_in_memory_runs(elastic):
    windows = read_windows(Calibration(max_seq_length=128), Checkpoint(elastic), most=500)
    points = [Point("two-level", 16), Point("two-level", 16, 0.25)]
    found = stream_losses(Checkpoint(elastic), windows, points, ComputeOptions(torch.float32))
    assert found.active[0].tolist() == [16.0] * 4
    model = prism_refactor.load(elastic, budget=0.25).float()
    ran = [[] for _ in range(4)]
    for layer, block in enumerate(moe_blocks(model)):
        block.experts.two_level.register_forward_hook(lambda _, __, output, layer=layer: ran[layer].append((output[1] != 64).sum(1)))
    for row in windows.rows:
        logits(model, row[None])
    expected = [torch.stack(each)[windows.scored].double().mean().item() for each in ran]
    assert found.active[1].tolist() == pytest.approx(expected, rel=0.001)
    assert found.sample[0].tolist() == [16.0] * 48
    first = torch.stack([each[windows.sample_row][:48] for each in ran]).double().mean(0)
    # A token near a threshold may fall on its other side.
    assert (found.sample[1] != first).sum() <= 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "choose either k"),
        ({"k": 3, "budget": 0.5}, "choose either k"),
        ({"budget": 0}, "above 0 and at most 1"),
        ({"budget": 1.5}, "above 0 and at most 1"),
        ({"budget": float("nan")}, "above 0 and at most 1"),
    ],
)
def test_what_is_no_budget_is_refused(elastic, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        prism_refactor.set_active(attach(load(elastic), elastic), **arguments)


def test_models_that_cannot_run_within_a_budget_say_so(models, command, tmp_path):
    assert command("prism-refactor", models["olmoe"], tmp_path / "out", *FAST).code == 0
    assert command("prism-refactor", models["olmoe"], tmp_path / "replicate", *FAST, "--router", "replicate").code == 0
    with pytest.raises(ValueError, match="needs two-level routing"):
        prism_refactor.set_active(load(tmp_path / "out"), budget=0.5)
    old = without_thresholds(tmp_path / "out")
    with pytest.raises(ValueError, match="refactor it again"):
        prism_refactor.load(old, budget=0.5)
    assert prism_refactor.load(old, k=3) is not None
    for folder, reason in ((old, "refactor it again"), (tmp_path / "replicate", "use --router two-level or another folder")):
        result = command("prism-eval", models["olmoe"], folder, *TEXT, "--budget", "25%")
        assert result.code == 2
        assert reason in result.err


@pytest.mark.parametrize(
    ("text", "reason"),
    [("0", "above 0"), ("101%", "above 0"), ("nan", "above 0"), ("a", "write shares"), ("", "write shares"), ("25%,", "write")],
)
def test_what_is_no_list_of_shares_is_refused(command, elastic, text, reason):
    result = command("prism-eval", EXAMPLE, elastic, *TEXT, "--budget", text)
    assert result.code == 2
    assert reason in result.err


def test_python_refuses_what_is_no_share(elastic):
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        prism_refactor.evaluate(EXAMPLE, elastic, budgets=[0.5, 1.5])


@pytest.mark.parametrize("family", ["deepseek_v3-grouped", "gpt_oss", "hunyuan_v1_moe", "qwen3_vl_moe", "llama4", "step3p7"])
@pytest.mark.parametrize("router", ["linear", "proxy"])
def test_other_families_run_within_a_budget(models, command, tmp_path, token_ids, family, router):
    assert command("prism-refactor", models[family], tmp_path / "out", *FAST, "--router", router).code == 0
    model = prism_refactor.load(tmp_path / "out", budget=0.5)
    half = logits(model, token_ids)
    assert torch.isfinite(half).all()
    again = load(tmp_path / "out", trust_remote_code=True)
    prism_refactor.set_active(again, budget=0.5)
    torch.testing.assert_close(logits(again, token_ids), half, atol=1e-4, rtol=0)
    set_token_active(again, [1 + place % 3 for place in range(token_ids.numel())])
    assert torch.isfinite(logits(again, token_ids)).all()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_every_implementation_runs_the_same_tokens(models, command, tmp_path, token_ids, family):
    assert command("prism-refactor", models[family], tmp_path / "out", *FAST).code == 0
    model = prism_refactor.load(tmp_path / "out")
    found = []
    for implementation in ("eager", "grouped_mm", "batched_mm", EXPERTS):
        model.set_experts_implementation(implementation)
        prism_refactor.set_active(model, budget=0.4)
        within = logits(model, token_ids)
        set_token_active(model, [1 + place % 3 for place in range(token_ids.numel())])
        found.append((within, logits(model, token_ids)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_model_in_slow_memory_runs_within_a_budget(models, command, tmp_path, token_ids):
    assert command("prism-refactor", models["olmoe"], tmp_path / "out", *FAST).code == 0
    expected = logits(prism_refactor.load(tmp_path / "out", budget=0.3), token_ids)
    model = load_offloaded(tmp_path / "out", CacheBudget("50%"), prefetch="router")
    try:
        set_active(model, budget=0.3)
        torch.testing.assert_close(logits(model, token_ids), expected, atol=1e-4, rtol=0)
        for token in token_ids[0, :5]:
            logits(model, token[None, None])
    finally:
        model.offload.close()


@pytest.mark.parametrize("convert", [torch.nn.Module.bfloat16, torch.nn.Module.half, lambda model: model.to(torch.bfloat16)])
def test_a_model_that_is_converted_keeps_the_types_of_its_router(elastic, token_ids, convert):
    exact = prism_refactor.load(elastic, budget=0.25).float()
    model = convert(prism_refactor.load(elastic, budget=0.25))
    kept = {name: value.dtype for name, value in moe_blocks(model)[0].experts.two_level.named_buffers(recurse=False)}
    assert set(kept.values()) == {torch.float32}
    assert {value.dtype for value in moe_blocks(model)[0].experts.two_level.original.buffers()} == {model.dtype}
    found = logits(model, token_ids).float()
    assert (found.softmax(-1) - logits(exact, token_ids).softmax(-1)).abs().mean() < 1e-4
    prism_refactor.set_active(model, 16)
    logits(model, token_ids)
