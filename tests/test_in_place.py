"""Families whose own classes cannot run split experts: the checkpoint is the original, and its experts are cut when it is loaded."""

import json

import pytest
import torch
from conftest import FAST, IN_PLACE, files, load, logits, mostly_long
from safetensors.torch import load_file
from transformers import AutoConfig

import prism_refactor
from prism_refactor.errors import InputError
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.modeling_prism import attach, cut, full_k, moe_blocks, set_active
from prism_refactor.offload.manager import load_offloaded
from prism_refactor.offload.options import CacheBudget
from prism_refactor.progress import Progress


@pytest.fixture
def written(command, models, tmp_path):
    """Refactor a family: written('jamba') -> (the original, the result)."""

    def write(family, *options):
        result = command("prism-refactor", models[family], tmp_path / "out", *FAST, *options)
        assert result.code == 0, result.err
        return models[family], tmp_path / "out"

    return write


@pytest.mark.parametrize(
    ("family", "router"), mostly_long([(family, router) for family in IN_PLACE for router in ("linear", "proxy")], ("jamba", "linear"))
)
def test_full_k_is_the_original(written, command, token_ids, family, router):
    source, out = written(family, "--router", router, "--num-samples", "64")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    if "text_config" in changed:
        assert before["text_config"] == {key: value for key, value in after["text_config"].items() if key != "prism"}
    assert changed - {"prism", "text_config"} == {"auto_map"}
    expected, plain = logits(load(source), token_ids), load(out)
    assert type(plain) is type(load(source))
    torch.testing.assert_close(logits(plain, token_ids), expected, atol=1e-4, rtol=0)
    for model in (prism_refactor.load(out), load(out, trust_remote_code=True)):
        torch.testing.assert_close(logits(model, token_ids), expected, atol=1e-4, rtol=0)
        set_active(model, 3)
        fewer = logits(model, token_ids)
        assert not torch.allclose(fewer, expected, atol=1e-2)
        model.set_experts_implementation(EXPERTS)
        torch.testing.assert_close(logits(model, token_ids), fewer, atol=1e-4, rtol=0)
    assert command("prism-verify", source, out, "--num-samples", "2", "--max-seq-length", "64", "--tolerance", "0.0001").code == 0
    if router == "linear":
        for layer in json.loads((out / "prism.json").read_text())["layers"]:
            assert layer["output_error"]["two-level"][-1] < 1e-8
            assert layer["output_error"]["two-level"][0] < 0.6


def test_a_loaded_model_is_saved_as_it_was_read(written, tmp_path, token_ids):
    source, out = written("hunyuan_v1_moe")
    model = prism_refactor.load(out, k=3)
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()
    torch.testing.assert_close(logits(load(tmp_path / "again"), token_ids), logits(load(source), token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("concatenated", [False, True])
def test_what_is_cut_is_saved_whole(transposed, concatenated):
    experts = torch.nn.Module()
    experts.num_experts, experts.is_transposed, experts.is_concatenated = 3, transposed, concatenated
    for name, shape in (("gate_up_proj", (16, 5)), ("down_proj", (5, 8)), ("gate_up_proj_bias", (16,)), ("down_proj_bias", (5,))):
        turned = transposed and len(shape) == 2
        experts.register_parameter(name, torch.nn.Parameter(torch.randn(3, *(shape[::-1] if turned else shape))))
    before = experts.state_dict()
    cut(experts, 4)
    assert experts.num_experts == 12
    assert len(experts.down_proj) == 12
    after = experts.state_dict()
    assert all(torch.allclose(after[name], value) and after[name].shape == value.shape for name, value in before.items())


def test_an_interrupted_run_ends_with_the_same_bytes(written, command, models, tmp_path, monkeypatch):
    _, out = written("jamba")
    finished = files(out)
    finish = Progress.finish_layer

    def stop(self, *arguments):
        finish(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "finish_layer", stop)
    assert command("prism-refactor", models["jamba"], tmp_path / "again", *FAST).code == 130
    monkeypatch.undo()
    assert command("prism-refactor", models["jamba"], tmp_path / "again", *FAST, "--resume").code == 0
    assert files(tmp_path / "again") == finished


def test_evaluation_runs_the_two_level_router(written, command):
    source, out = written("phimoe")
    options = ["--num-tokens", "512", "--max-seq-length", "64", "--json"]
    result = command("prism-eval", source, out, *options, "--router", "both", "--k", "4,8")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    (curve,) = found["refactored"]
    assert curve["router"] == "two-level"
    assert curve["points"][-1]["perplexity"] == pytest.approx(found["original"]["points"][-1]["perplexity"], rel=1e-4)
    # It is the original, and a sub-expert has a quarter of what is stored as one expert.
    assert curve["points"][-1]["cost"] == found["original"]["points"][-1]["cost"]
    refused = command("prism-eval", source, out, *options, "--router", "stock")
    assert refused.code == 2
    assert "as a stock model is the original; use --router two-level" in refused.err


def test_the_original_of_a_fixed_router_is_measured_at_its_heaviest_experts(models, command):
    """Whose router chooses two experts, whatever it is told."""
    result = command("prism-eval", models["phimoe"], "--num-tokens", "512", "--max-seq-length", "64", "--json")
    one, two = json.loads(result.out)["original"]["points"]
    assert one["perplexity"] != two["perplexity"]


def test_what_cannot_be_done_is_refused_in_one_line(written, command, models, tmp_path):
    result = command("prism-refactor", models["jamba"], tmp_path / "none", *FAST, "--router", "replicate")
    assert result.code == 2
    assert "--router replicate" in result.err
    assert "use linear or proxy" in result.err
    _, out = written("jamba")
    result = command("prism-finetune", out, tmp_path / "tuned", "--router", "stock")
    assert result.code == 2
    assert "use --router two-level" in result.err
    with pytest.raises(InputError, match="holds its experts whole"):
        load_offloaded(out, CacheBudget("50%"))
    with pytest.raises(ValueError, match="attach it first"):
        set_active(load(out), 3)
    again = command("prism-refactor", out, tmp_path / "twice", *FAST)
    assert again.code == 3
    assert "refactored already" in again.err


def test_the_sub_router_is_trained(written, command, tmp_path):
    _, out = written("hunyuan_v1_moe")
    options = ["--steps", "2", "--num-samples", "16", "--max-seq-length", "32", "--quiet"]
    result = command("prism-finetune", out, tmp_path / "tuned", *options)
    assert result.code == 0, result.err
    assert prism_refactor.load(tmp_path / "tuned", k=3) is not None


def test_it_says_what_it_is(written, command, models):
    explained = command("prism-profile", "--explain", models["jamba"])
    assert explained.code == 0
    assert "two-level only" in explained.out
    source, out = written("jamba")
    planned = command("prism-refactor", source, out.with_name("planned"), "--dry-run")
    assert "two-level only" in planned.out
    assert "llama.cpp: runs it as the original" in planned.out
    card = (out / "README.md").read_text()
    assert "prism-vllm" not in card
    assert "which splits them in memory, at any k from 1 to 8" in card
    assert AutoConfig.from_pretrained(out).prism["stock"] is False


def test_a_state_that_was_saved_is_loaded_again(written, token_ids):
    _, out = written("hunyuan_v1_moe")
    model, other = attach(load(out), out), attach(load(out), out)
    expected = logits(model, token_ids)
    for value in other.parameters():
        value.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, token_ids), expected)


def test_another_number_of_the_originals_experts_is_refused(written):
    _, out = written("hunyuan_v1_moe")
    with pytest.raises(ValueError, match=r"num_experts_per_tok was changed, which this model's own router reads; use set_active"):
        load(out, trust_remote_code=True, moe_topk=4)


def test_training_does_not_draw_experts_at_random(written, command, tmp_path):
    """PhiMoE's router does, in training."""
    _, out = written("phimoe")
    options = ["--steps", "2", "--num-samples", "16", "--max-seq-length", "32", "--quiet"]
    tuned = []
    for name in ("one", "two"):
        assert command("prism-finetune", out, tmp_path / name, *options).code == 0
        tuned.append(files(tmp_path / name))
    assert tuned[0] == tuned[1]


def test_attaching_twice_cuts_once(written, token_ids):
    _, out = written("hunyuan_v1_moe")
    model = attach(load(out), out)
    once = logits(model, token_ids)
    assert torch.equal(logits(attach(model, out), token_ids), once)
    assert {block.experts.num_experts for block in moe_blocks(model)} == {16}
    assert full_k(model.config) == 8
