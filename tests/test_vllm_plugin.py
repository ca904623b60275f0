"""The parts of the vLLM plugin that need no vLLM: its arithmetic against `modeling_prism`, its reading of files, its k of a request."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAST, PLAIN, load, mostly_long
from hypothesis import given
from hypothesis import strategies as st
from prism_vllm.checkpoint import CheckpointError, RefactoredCheckpoint
from prism_vllm.routing import ACTIVATIONS, UNGATED, SubRouter, route
from prism_vllm.serving import Serving
from safetensors.torch import load_file, save_file

from prism_refactor.models import modeling_prism
from prism_refactor.models.architectures import original_routing, routing
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.modeling_prism import ROUTER_FILE, TwoLevelRouter, moe_blocks, router_of
from prism_refactor.models.transformers_models import adopt_experts
from prism_refactor.server.quality import QualityCurve

SUB_EXPERTS, TOKENS = 4, 40


def dense(weights, ids, total):
    """Weights of all sub-experts, [T, total], whatever the order and number of the chosen ones."""
    spare = torch.zeros(len(weights), total + 1)
    return spare.scatter_add_(1, ids.long(), weights.float())[:, :total]


def random_tensors(kind, experts, top_k, hidden, has_bias):
    """Tensors of a sub-router as `modeling_prism` takes them."""
    found = {"threshold": torch.randn(top_k * SUB_EXPERTS).sort(descending=True).values - 1}
    if kind == "linear":
        found |= {"weight": torch.randn(experts, SUB_EXPERTS, hidden) / 4, "bias": torch.randn(experts, SUB_EXPERTS)}
        found["ceiling"] = torch.randn(experts, SUB_EXPERTS) + 1
        found["compensation"] = torch.randn(2, experts, SUB_EXPERTS, hidden)
        found["scale"] = torch.rand(top_k * SUB_EXPERTS) + 0.5
        found |= {"map_in": torch.randn(5, hidden), "map_out": torch.randn(hidden, 5)}
        return found
    found["rows"] = torch.randn(experts, SUB_EXPERTS, 6, hidden)
    if has_bias:
        found["row_bias"] = torch.randn(experts, SUB_EXPERTS, 6)
    return found


def activations_like(block, gate, up):
    """The names of the activations that are that of a block's experts."""
    if not hasattr(block.experts, "gate_up_proj"):
        return [name for name, function in UNGATED.items() if torch.allclose(function(up), block.experts.act_fn(up), atol=1e-6)]
    both = torch.cat([gate, up], -1) if block.experts.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
    expected = modeling_prism.activation_of(block.experts)(both)
    return [name for name, function in ACTIVATIONS.items() if torch.allclose(function(gate, up), expected, atol=1e-6)]


@pytest.mark.parametrize("kind", ["linear", "proxy"])
@pytest.mark.parametrize("family", PLAIN)
def test_routing_is_that_of_the_checkpoints_own_file(models, family, kind):
    model = adopt_experts(load(models[family]))
    block, key = moe_blocks(model)[0], Checkpoint(models[family]).architecture
    config = model.config.get_text_config()
    experts, top_k, *_ = key.sizes(config).values()
    torch.manual_seed(0)
    (activation,) = activations_like(block, torch.randn(5, 8), torch.randn(5, 8))
    tensors = random_tensors(kind, experts, top_k, config.hidden_size, block.experts.has_bias)
    groups = key.groups(config)
    function = modeling_prism.activation_of(block.experts)
    reference = TwoLevelRouter(router_of(block), experts, SUB_EXPERTS, 4, kind, tensors, function, groups)
    if groups > 1:
        tensors["places"] = modeling_prism.places(experts, SUB_EXPERTS, groups).flatten()
    if "correction" in original_routing(block):
        reference.register_buffer("correction", original_routing(block)["correction"])
    if kind == "proxy" and not block.experts.is_concatenated:
        # `modeling_prism` keeps rows in the order of the experts' own; the plugin has gate rows first.
        order = torch.tensor([0, 2, 4, 1, 3, 5])
        tensors = {name: value if name == "threshold" else value[:, :, order] for name, value in tensors.items()}
    hidden = torch.randn(TOKENS, config.hidden_size)
    full = top_k * SUB_EXPERTS
    with torch.inference_mode():
        _, weights, chosen = routing(block, hidden)
        some = torch.rand(TOKENS) * (torch.arange(TOKENS) % 3 > 0)
        none = torch.zeros(TOKENS)
        for k, budget in (
            (torch.full((TOKENS,), full), none),
            (torch.full((TOKENS,), 3), none),
            (torch.randint(1, full + 1, (TOKENS,)), none),
            (torch.randint(1, full + 1, (TOKENS,)), some),
            (torch.full((TOKENS,), full), torch.full((TOKENS,), 0.4)),
        ):
            mixed = k if len(k.unique()) > 1 or budget.any() else None
            kept, ids, missing = reference(hidden, weights, chosen, int(k.max()), mixed, budget if budget.any() else None)
            active = torch.where(budget > 0, budget, k)
            found = route(SubRouter.of(tensors, activation), hidden, weights, chosen, active, 4, activation)
            total = experts * SUB_EXPERTS
            torch.testing.assert_close(dense(found[0], found[1], total), dense(kept, ids, total), atol=1e-6, rtol=1e-5)
            assert ((found[0] != 0).sum(1) == (kept != 0).sum(1)).all()
            assert (found[1] >= 0).all()
            if missing is None:
                assert found[2] is None or found[2].abs().max() == 0
            else:
                torch.testing.assert_close(found[2], missing, atol=1e-4, rtol=1e-4)


def test_routing_compiles_to_the_same():
    torch.manual_seed(0)
    router, hidden = SubRouter.of(random_tensors("linear", 6, 2, 32, False), "silu"), torch.randn(TOKENS, 32)
    weights, experts = torch.rand(TOKENS, 6).topk(2)
    active = torch.where(torch.arange(TOKENS) % 2 == 0, torch.randint(1, 9, (TOKENS,)), torch.rand(TOKENS))
    arguments = router, hidden, weights, experts, active, 4, "silu"
    expected = route(*arguments)
    found = torch.compile(route, fullgraph=True, backend="aot_eager")(*arguments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture(scope="module")
def local():
    """Open a local checkpoint as the plugin does."""

    def open_checkpoint(folder):
        config = json.loads((folder / "config.json").read_text())
        config = config.get("text_config", config)
        prism = config["prism"]
        return RefactoredCheckpoint(prism, config[prism["top_k"]], lambda name: str(folder / name) if (folder / name).exists() else None)

    return open_checkpoint


# But for Step-3.7, which has a matrix of the gates of all experts.
READ = [family for family in PLAIN if family != "step3p7"]


@pytest.mark.parametrize("family", mostly_long(READ, "olmoe", "gpt_oss", "deepseek_v3-grouped", "granitemoeshared"))
def test_rows_of_gate_neurons_are_read_from_the_shards(models, command, local, tmp_path, family):
    assert command("prism-refactor", models[family], tmp_path / "out", "--router", "proxy", *FAST).code == 0
    model = load(tmp_path / "out")
    checkpoint, file = local(tmp_path / "out"), modeling_prism.router_tensors(tmp_path / "out" / modeling_prism.ROUTER_FILE)
    blocks = moe_blocks(model)
    assert len(checkpoint.blocks) == len(blocks)
    for block, (layer, name) in zip(blocks, checkpoint.blocks, strict=True):
        found = checkpoint.tensors(layer)
        expected = modeling_prism._gate_neuron_rows(
            block.experts, file[name]["gate_neurons"], model.config.get_text_config().prism["groups"]
        )
        assert ("row_bias" in found) == block.experts.has_bias
        for key, value in expected.items():
            places = slice(None)
            if not block.experts.is_concatenated:
                half = value.shape[2] // 2
                places = torch.stack([torch.arange(half) * 2, torch.arange(half) * 2 + 1]).flatten()
            assert torch.equal(found[key].float(), value[:, :, places].float())


def fake(most=16, quality=None, thresholds=True):
    checkpoint = RefactoredCheckpoint({"sub_experts": 4, "factor": 4, "top_k": "k", "source": {"k": 4}}, most, lambda _: None)
    vars(checkpoint).update(quality=quality, has_thresholds=thresholds)
    return checkpoint


def test_k_of_a_request():
    serving = Serving.of(fake(quality={4: 0.9, 5: 0.95, 16: 1.0}), {"prism_k": 8, "another": 1})
    assert serving.active_of(None) == serving.active_of({}) == serving.active_of({"other": 3}) == 8
    assert serving.active_of({"prism_k": 16}) == 16
    assert serving.active_of({"prism_quality": 0.91}) == 5
    assert serving.active_of({"prism_quality": 1}) == 16
    assert Serving.of(fake(12), {}).active_of(None) == 12
    for asked in (0, 17, -1, "8", 8.0, 2.5, True, None, [4], float("nan")):
        with pytest.raises(ValueError, match=r"prism_k: .* is not a whole number from 1 to 16"):
            serving.active_of({"prism_k": asked})
    for asked in (0, 1.1, "0.9", True, None, float("nan"), -0.5):
        with pytest.raises(ValueError, match=r"prism_quality: .* is not a number above 0 and at most 1"):
            serving.active_of({"prism_quality": asked})
    for asked, said in (({"prism_k": 1, "prism_quality": 1}, "one of them"), ({"prism_K": 1}, "prism_K: unknown")):
        with pytest.raises(ValueError, match=said):
            serving.active_of(asked)
    with pytest.raises(ValueError, match="was not measured"):
        Serving.of(fake(), {}).active_of({"prism_quality": 0.9})
    with pytest.raises(ValueError, match="needs k = 16, and this server runs at most 8"):
        Serving.of(fake(8, quality={4: 0.9, 16: 1.0}), {}).active_of({"prism_quality": 0.95})


def test_options_of_a_server_that_cannot_work_are_refused():
    for most, additional, said in (
        (17, {}, "k 17: choose 1 to 16"),
        (16, {"prism_k": 17}, "whole number from 1 to 16"),
        (16, {"prism_k": "4"}, "whole number"),
        (16, {"prism_top": 4}, "prism_top: unknown"),
        (16, {"prism_k": 4, "prism_budget": 0.25}, "prism_budget and prism_k: write one of them"),
        (16, {"prism_budget": 0}, "not a number above 0 and at most 1"),
        (16, {"prism_quality": 0.9}, "prism_quality: unknown"),
        (4, {"prism_budget": 0.25}, "this server runs at most 4 of 16; write prism_k"),
    ):
        with pytest.raises(CheckpointError, match=said):
            Serving.of(fake(most), additional)


def test_the_budget_of_a_request():
    serving = Serving.of(fake(), {"prism_budget": 0.25})
    assert (serving.default, serving.active_of(None), serving.active_of({"prism_k": 3})) == (0.25, 0.25, 3)
    assert serving.active_of({"prism_budget": 0.4}) == 0.4
    # All is the whole model.
    assert serving.active_of({"prism_budget": 1}) == serving.active_of({"prism_budget": 1.0}) == 16
    for asked, active in ((0.99999999, 16), (0.9996, 16), (0.9994, 0.999), (1e-9, 0.001), (0.2502, 0.25)):
        assert serving.active_of({"prism_budget": asked}) == active
    for asked in (0, 1.1, "0.9", True, None, float("nan"), -0.5):
        with pytest.raises(ValueError, match=r"prism_budget: .* is not a number above 0 and at most 1"):
            serving.active_of({"prism_budget": asked})
    with pytest.raises(ValueError, match="has no thresholds; refactor it again, or write prism_k"):
        Serving.of(fake(thresholds=False), {}).active_of({"prism_budget": 0.25})


def test_thresholds_are_those_of_the_router_file(elastic, local, tmp_path):
    assert local(elastic).has_thresholds
    kept = {name: value for name, value in load_file(elastic / ROUTER_FILE).items() if not name.endswith(".threshold")}
    save_file(kept, tmp_path / ROUTER_FILE)
    assert not replace(local(elastic), path=lambda name: str(tmp_path / name)).has_thresholds


@given(st.dictionaries(st.integers(1, 15), st.floats(1.0, 100.0), min_size=1, max_size=8), st.floats(1.0, 100.0), st.floats(0.01, 1.0))
def test_quality_means_what_it_means_to_prism_serve(tmp_path_factory, perplexities, full, quality):
    folder = tmp_path_factory.mktemp("curve")
    points = [{"k": k, "perplexity": value} for k, value in (perplexities | {16: full}).items()]
    (folder / "evaluation.json").write_text(json.dumps({"refactored": [{"router": "two-level", "points": points}]}))
    checkpoint = replace(fake(), path=lambda name: str(folder / name))
    ours, theirs = checkpoint.quality, QualityCurve({point["k"]: point["perplexity"] for point in points})
    assert ours is not None
    assert Serving.of(checkpoint, {}).active_of({"prism_quality": quality}) == theirs.k_for(quality)
    assert np.allclose(list(ours.values()), [theirs.quality_of(k) for k in ours])
