"""Routers that read more than what their experts read, and experts that transformers has not marked for other implementations."""

import json
import shutil

import pytest
import torch
from conftest import FAST, build, load, logits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from prism_refactor.cli import app as door
from prism_refactor.cli import report
from prism_refactor.errors import InputError, UsageError
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.discovery import discover, reduced
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.layered import LayeredModel
from prism_refactor.models.modeling_prism import moe_blocks
from prism_refactor.models.transformers_models import adopt_experts, run_experts_with
from prism_refactor.offload.manager import load_offloaded
from prism_refactor.offload.options import CacheBudget


def test_what_needs_a_plain_router_is_refused_or_left_out(command, models, tmp_path):
    source, out = models["gemma4_text"], tmp_path / "out"
    assert command("prism-refactor", source, out, *FAST).code == 0
    layers = json.loads((out / "prism.json").read_text())["layers"]
    assert all(layer["output_error"].keys() == {"k", "two-level"} for layer in layers)
    assert door.run(report.main.command, [str(out), "--quiet"]) == 0
    assert (out / "report.html").exists()
    with pytest.raises(UsageError, match="reads more than what its experts read"):
        load_offloaded(out, CacheBudget("50%"), prefetch="both")


def test_without_a_sub_router_no_error_is_measured(command, models, tmp_path):
    options = [models["gemma4_text"], tmp_path / "out", *FAST, "--router", "replicate"]
    refused = command("prism-refactor", *options, "--require", "error@50%<0.9")
    assert refused.code == 2
    assert "the errors of a gemma4_text are not measured" in refused.err
    assert command("prism-refactor", *options).code == 0
    options = ["--num-samples", "2", "--max-seq-length", "64"]
    assert command("prism-verify", models["gemma4_text"], tmp_path / "out", *options).code == 0


@pytest.mark.parametrize("family", ["afmoe", "gemma4_text"])
def test_routers_with_a_matrix_in_a_part_are_trained(command, models, tmp_path, token_ids, family):
    assert command("prism-refactor", models[family], tmp_path / "out", *FAST).code == 0
    options = ["--router", "stock", "--steps", "1", "--num-samples", "16", "--max-seq-length", "32", "--learning-rate", "0.1", "--quiet"]
    result = command("prism-finetune", tmp_path / "out", tmp_path / "tuned", *options)
    assert result.code == 0, result.err
    before, after = (logits(load(tmp_path / name), token_ids) for name in ("out", "tuned"))
    best = json.loads((tmp_path / "tuned" / "prism.json").read_text())["finetuning"]["best_step"]
    assert torch.equal(before, after) == (best == 0)


def test_models_that_were_loaded_before_still_run(models, token_ids):
    model = load(models["step3p7"])
    expected = logits(model, token_ids)
    LayeredModel(Checkpoint(models["step3p7"]), None)
    assert torch.equal(logits(model, token_ids), expected)
    adopt_experts(model)
    assert torch.equal(logits(model, token_ids), expected)
    run_experts_with(model, EXPERTS)
    torch.testing.assert_close(logits(model, token_ids), expected, atol=1e-5, rtol=1e-5)
    assert {block.experts.prism_implementation for block in moe_blocks(model)} == {EXPERTS}


def test_a_family_that_is_refused_still_runs(tmp_path, token_ids):
    """LongCat-Flash: its experts have the arguments of others, and more in them."""
    config = reduced(AutoConfig.for_model("longcat_flash"))
    with pytest.raises(InputError, match="LongcatFlashExperts does not follow"):
        discover(config)
    AutoModelForCausalLM.from_config(config)(input_ids=token_ids[:1] % config.vocab_size)


def test_names_without_the_prefix_of_the_model(command, tmp_path, token_ids):
    """As checkpoints of a model without its head have them, and DeepSeek-V4's."""
    source, out = build("qwen3_moe", tmp_path / "source"), tmp_path / "out"
    expected = logits(load(source), token_ids)
    tensors = load_file(source / "model.safetensors")
    shutil.move(source, tmp_path / "bare")
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(bare, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    assert command("prism-refactor", tmp_path / "bare", out, *FAST).code == 0
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any(name.startswith("model.") for name in names)
    assert command("prism-verify", tmp_path / "bare", out, "--num-samples", "2", "--max-seq-length", "64").code == 0
    torch.testing.assert_close(logits(load(out), token_ids), expected, atol=1e-4, rtol=0)
    options = ["--router", "stock", "--steps", "1", "--num-samples", "16", "--max-seq-length", "32", "--quiet"]
    tuned = command("prism-finetune", out, tmp_path / "tuned", *options)
    assert tuned.code == 0, tuned.err
    assert not torch.equal(logits(load(tmp_path / "tuned"), token_ids), expected)


@pytest.mark.parametrize("value", [None, "8", [], [2, 4]])
def test_sizes_that_are_no_number_are_refused(command, models, tmp_path, value):
    folder = shutil.copytree(models["hunyuan_v1_moe"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_topk": value}))
    result = command("prism-refactor", folder, tmp_path / "out", *FAST)
    assert result.code == 3
    assert result.err.count("\n") == 1
    assert str(folder / "config.json") in result.err
