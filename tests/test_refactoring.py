import json
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from conftest import EXAMPLE, FAMILIES, FAST, PLAIN, build, files, load, logits, mostly_long
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.linear_model import RidgeCV
from transformers import AutoModelForCausalLM, AutoTokenizer

from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.text import EVALUATION_TEXT, load_tokenizer, token_rows
from prism_refactor.formats import Source
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.modeling_prism import ROUTER_FILE, attach, moe_blocks, moe_gates, router_tensors, set_active
from prism_refactor.recipe import Recipe
from prism_refactor.refactoring import verify
from prism_refactor.refactoring.engines import engine_notes
from prism_refactor.refactoring.plan import make_plan
from prism_refactor.routing.output import relative_error
from prism_refactor.routing.proxy import gate_neurons
from prism_refactor.solvers.regression import STRENGTHS, ridge


def refactored(command, source, target, *options):
    result = command("prism-refactor", source, target, *FAST, *options)
    assert result.code == 0, result.err
    return target


@pytest.mark.parametrize(
    ("router", "family"),
    mostly_long(
        [*product(["replicate", "linear", "proxy"], FAMILIES)], ("linear", "olmoe"), ("proxy", "gpt_oss"), ("replicate", "deepseek_v3")
    ),
)
def test_full_k_is_the_original(tmp_path, models, command, token_ids, family, router):
    samples = 64 if router == "linear" else 8
    out = refactored(command, models[family], tmp_path / "out", "--router", router, "--num-samples", samples)
    expected = logits(load(models[family]), token_ids)
    stock = load(out)
    assert type(stock) is type(load(models[family]))
    torch.testing.assert_close(logits(stock, token_ids), expected, atol=1e-3, rtol=0)
    if router != "replicate":
        model = attach(stock, out)
        torch.testing.assert_close(logits(model, token_ids), expected, atol=1e-3, rtol=0)
        # Below full k our experts and the family's own are the same function of what the router picks.
        set_active(model, 3)
        fewer = logits(model, token_ids)
        model.set_experts_implementation(EXPERTS)
        torch.testing.assert_close(logits(model, token_ids), fewer, atol=1e-3, rtol=0)
        assert not torch.allclose(fewer, expected, atol=1e-2)
    assert command("prism-verify", models[family], out, "--num-samples", "2", "--max-seq-length", "64").code == 0
    if router == "linear":
        for layer in json.loads((out / "prism.json").read_text())["layers"]:
            # Half the sub-experts are closer to the layer's output than half the experts, where these can be measured.
            assert ("original" in layer["output_error"]) == (family in PLAIN)
            assert layer["output_error"]["two-level"][0] < 0.6 * layer["output_error"].get("original", [1])[0]


@pytest.mark.parametrize("sub_experts", [2, 8])
def test_other_numbers_of_sub_experts(tmp_path, models, command, token_ids, sub_experts):
    out = refactored(command, models["mixtral"], tmp_path / "out", "--sub-experts", sub_experts)
    config = json.loads((out / "config.json").read_text())
    assert (config["num_local_experts"], config["intermediate_size"]) == (4 * sub_experts, 32 // sub_experts)
    assert config["num_experts_per_tok"] == 2 * sub_experts
    model = attach(load(out), out)
    torch.testing.assert_close(logits(model, token_ids), logits(load(models["mixtral"]), token_ids), atol=1e-3, rtol=0)


def test_the_stock_checkpoint_is_the_original_at_full_k(elastic):
    rows = token_rows([EVALUATION_TEXT], load_tokenizer(EXAMPLE), 8, 256, 0)
    torch.testing.assert_close(logits(load(elastic), rows), logits(load(EXAMPLE), rows), atol=1e-3, rtol=0)
    before, after = (load_file(sorted(folder.glob("model*.safetensors"))[-1]) for folder in (EXAMPLE, elastic))
    gates = [name for name in after if name.endswith("mlp.gate.weight")]
    for name in gates:
        assert torch.equal(after[name], before[name].repeat_interleave(4, 0))


@torch.inference_mode()
def layer_errors(folder, k, rows):
    """Squared relative error of each MoE block's output at k against full k, on the inputs of the full model, and the full outputs."""
    return layer_errors_of(load(folder) if folder == EXAMPLE else attach(load(folder), folder), k, rows)


@torch.inference_mode()
def layer_errors_of(model, k, rows):
    top_k, active = moe_gates(model)[0].top_k, getattr(model, "prism_active", None)
    blocks = [layer.mlp for layer in model.model.layers]
    inputs = []
    handles = [block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])) for block in blocks]
    model(input_ids=rows)
    for handle in handles:
        handle.remove()
    full = [block(x) for block, x in zip(blocks, inputs, strict=True)]

    def run_at(k):
        for layer, block in enumerate(blocks):
            if active is None:
                block.gate.top_k = k
            else:
                active.per_layer[layer] = k

    run_at(k)
    errors = [relative_error(block(x), exact) for block, x, exact in zip(blocks, inputs, full, strict=True)]
    run_at(top_k)
    return errors


def test_half_the_sub_experts_lose_at_most_half_of_what_half_the_experts_lose(elastic):
    rows = token_rows([EVALUATION_TEXT], load_tokenizer(EXAMPLE), 8, 256, 0)
    for ours, theirs in zip(layer_errors(elastic, 8, rows), layer_errors(EXAMPLE, 2, rows), strict=True):
        assert ours <= theirs / 2


def test_plain_transformers_runs_it_at_any_k_and_generates(elastic):
    tokenizer = AutoTokenizer.from_pretrained(elastic)
    inputs = tokenizer("The Python standard library", return_tensors="pt")
    for trust in (False, True):
        for k in range(1, 17):
            model = AutoModelForCausalLM.from_pretrained(elastic, num_experts_per_tok=k, trust_remote_code=trust)
            assert type(model).__name__ == "OlmoeForCausalLM"
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            assert output.shape[1] == inputs["input_ids"].shape[1] + 4


def test_remote_code_and_attach_are_the_same_router(elastic, token_ids):
    attached = attach(load(elastic), elastic)
    remote = load(elastic, trust_remote_code=True)
    stock = load(elastic)
    for k in (16, 8, 3):
        for model in (attached, remote, stock):
            set_active(model, k)
            assert model.config.num_experts_per_tok == k
        assert torch.equal(logits(attached, token_ids), logits(remote, token_ids))
        assert not torch.equal(logits(attached, token_ids), logits(stock, token_ids))
    for k in (0, 17):
        with pytest.raises(ValueError, match="choose 1 to 16"):
            set_active(attached, k)


def test_saving_a_two_level_model_saves_the_stock_checkpoint(tmp_path, elastic, token_ids):
    attach(load(elastic), elastic).save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved"), token_ids), logits(load(elastic), token_ids))


@torch.inference_mode()
def test_two_level_runs_the_largest_by_weight_times_predicted_size_and_adds_the_mean_of_the_rest(elastic):
    model = attach(load(elastic), elastic)
    block = model.model.layers[1].mlp
    tensors = router_tensors(elastic / ROUTER_FILE)["model.layers.1.mlp"]
    inputs = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    set_active(model, 5)
    output = block(inputs[None])[0]
    probabilities = (inputs @ tensors["original.weight"].float().T).softmax(-1)
    top, experts = probabilities.topk(4)
    for token, x in enumerate(inputs):
        size, share = {}, {}
        for probability, expert in zip(top[token].tolist(), experts[token].tolist(), strict=True):
            log_size = torch.minimum(tensors["weight"][expert] @ x + tensors["bias"][expert], tensors["ceiling"][expert])
            for part, value in enumerate(log_size.exp().tolist()):
                size[4 * expert + part], share[4 * expert + part] = probability * value, probability
        expected, mapped = torch.zeros(256), tensors["map_out"] @ (tensors["map_in"] @ x)
        mean, direction = tensors["compensation"].flatten(1, 2)
        for place, index in enumerate(sorted(size, key=lambda index: -size[index])):
            if place < 5:
                gate, up = (block.experts.gate_up_proj[index] @ x).chunk(2)
                kept = block.experts.down_proj[index] @ (torch.nn.functional.silu(gate) * up)
                expected += kept * share[index] / 4 * tensors["scale"][4]
            else:
                expected += share[index] * mean[index] + size[index] * (direction[index] + mapped)
        torch.testing.assert_close(output[token], expected, atol=1e-4, rtol=1e-3)


def test_two_level_is_the_same_under_every_experts_implementation(elastic, token_ids):
    outputs = []
    for implementation in ("eager", "grouped_mm", "batched_mm", EXPERTS):
        model = attach(load(elastic), elastic)
        model.set_experts_implementation(implementation)
        set_active(model, 6)
        outputs.append(logits(model, token_ids))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-3, rtol=1e-3)


def test_k_can_be_set_layer_by_layer(elastic, token_ids):
    model = attach(load(elastic), elastic)
    set_active(model, [8] * 4)
    uniform = logits(model, token_ids)
    set_active(model, 8)
    assert torch.equal(logits(model, token_ids), uniform)
    set_active(model, [10, 6, 7, 9])
    assert model.prism_active.per_layer == [10, 6, 7, 9]
    assert not torch.equal(logits(model, token_ids), uniform)
    with pytest.raises(ValueError, match="k of 3 layers does not fit a model of 4"):
        set_active(model, [8] * 3)
    with pytest.raises(ValueError, match="choose 1 to 16"):
        set_active(model, [8, 8, 8, 17])


def test_replicate_has_no_sub_router(tmp_path, models, command):
    out = refactored(command, models["olmoe"], tmp_path / "out", "--router", "replicate")
    assert not (out / "modeling_prism.py").exists()
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    with pytest.raises(ValueError, match="no sub-expert router"):
        attach(load(out), out)


def test_output_has_everything_a_loader_and_a_reader_need(tmp_path, models, command):
    source = shutil.copytree(models["olmoe"], tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("the source's card")
    (source / "code").mkdir()
    (source / "code" / "extra.py").write_text("raise SystemExit('run')")
    out = refactored(command, source, tmp_path / "out", "--max-shard-size", "30KB")
    written = files(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "code/extra.py"):
        assert written[name] == (source / name).read_bytes()
    assert written["README.source.md"] == b"the source's card"
    assert b"num_experts_per_tok=4" in written["README.md"]
    shards = [name for name in written if name.startswith("model-")]
    index = json.loads(written["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == set(shards)
    sizes = {name: sum(tensor.nbytes for tensor in load_file(out / name).values()) for name in shards}
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert all(size <= 30_000 or len(load_file(out / name)) == 1 for name, size in sizes.items())
    assert (out / shards[0]).stat().st_mode & 0o444 == 0o444
    manifest = json.loads(written["prism.json"])
    assert manifest["recipe"]["solver"] == "ascent"
    assert manifest["calibration"]["datasets"] == ["bundled"]
    assert manifest["versions"]["transformers"]
    for layer in manifest["layers"]:
        assert all(expert["loss_after"] < expert["loss_before"] for expert in layer["experts"] if expert["tokens"] > 10)
    blocks = router_tensors(out / ROUTER_FILE)
    assert set(blocks) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    shapes = {name: tuple(tensor.shape) for name, tensor in blocks["model.layers.0.mlp"].items()}
    assert shapes == {
        "original.weight": (6, 32),
        "neuron_sub_expert": (6, 16),
        "weight": (6, 4, 32),
        "bias": (6, 4),
        "ceiling": (6, 4),
        "compensation": (2, 6, 4, 32),
        "scale": (8,),
        **{"map_in": (2, 32), "map_out": (32, 2), "threshold": (8,)},
    }


def test_source_bytes_pass_through_unchanged(tmp_path, command):
    source = build("qwen2_moe", tmp_path / "source", moe_intermediate_size=32)
    tensors = {name: value.bfloat16() for name, value in load_file(source / "model.safetensors").items()}
    tensors["model.mtp.0.unknown.weight"] = torch.arange(5, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = refactored(command, source, tmp_path / "out")
    written = {name: tensor for path in out.glob("model-*.safetensors") for name, tensor in load_file(path).items()}
    for name, tensor in tensors.items():
        if ".mlp.experts." in name or ".mlp.gate." in name:
            continue
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    assert written["model.layers.0.mlp.experts.15.down_proj.weight"].dtype == torch.bfloat16


def test_same_seed_same_bytes_on_any_number_of_workers_and_from_saved_statistics(tmp_path, models, command):
    def run(name, *options):
        chosen = [option for option in FAST if option not in ("--workers", "1", "--solver", "ascent")]
        result = command("prism-refactor", models["qwen3_moe"], tmp_path / name, *chosen, *options)
        assert result.code == 0, result.err
        return files(tmp_path / name)

    one = run("one", "--workers", "1")
    assert run("two", "--workers", "2") == one
    assert run("seeded", "--workers", "1", "--seed", "1") != one
    options = FAST[:6]
    assert command("prism-profile", models["qwen3_moe"], tmp_path / "stats", *options).code == 0
    result = command("prism-refactor", models["qwen3_moe"], tmp_path / "three", "--stats", tmp_path / "stats", "--workers", "1")
    assert result.code == 0, result.err
    assert files(tmp_path / "three") == one


@pytest.mark.parametrize("solver", ["genetic", "annealing", "greedy", "kmeans", "spectral", "metis", "random"])
def test_every_solver_gives_an_exact_checkpoint_of_its_own(tmp_path, models, command, solver):
    out = refactored(command, models["olmoe"], tmp_path / "out", "--solver", solver)
    other = refactored(command, models["olmoe"], tmp_path / "other")
    labels = [router_tensors(folder / ROUTER_FILE)["model.layers.0.mlp"]["neuron_sub_expert"] for folder in (out, other)]
    assert not torch.equal(*labels) or solver == "genetic"
    assert command("prism-verify", models["olmoe"], out, "--num-samples", "1", "--max-seq-length", "32").code == 0


@pytest.mark.parametrize(
    "option",
    [("--keep", "3"), ("--saliency", "activation"), ("--num-samples", "2"), ("--max-seq-length", "32"), ("--tokens-per-expert", "16")],
)
def test_options_have_an_effect(tmp_path, models, command, option):
    first = refactored(command, models["olmoe"], tmp_path / "a")
    second = refactored(command, models["olmoe"], tmp_path / "b", *option)
    name = "model.layers.0.mlp"
    labels = [router_tensors(folder / ROUTER_FILE)[name]["neuron_sub_expert"] for folder in (first, second)]
    assert not torch.equal(*labels)


def test_dtype_and_batch_size_reach_the_computation(tmp_path, models, command):
    for name, option in (("a", ()), ("b", ("--dtype", "bfloat16"))):
        assert command("prism-profile", models["olmoe"], tmp_path / name, *FAST[:6], *option, "--batch-size", "2").code == 0
    tensors = [load_file(tmp_path / name / "layer-00000.safetensors") for name in ("a", "b")]
    assert [part["inputs"].dtype for part in tensors] == [torch.float32, torch.bfloat16]


def test_dry_run_prints_the_plan_and_touches_nothing(tmp_path, models, command):
    result = command("prism-refactor", models["olmoe"], tmp_path / "out", "--dry-run")
    assert result.code == 0
    assert list(tmp_path.iterdir()) == []
    for line in (
        "num_experts       6      24",
        "tensors",
        "disk:",
        "memory:",
        "time:",
        "vLLM: runs it",
        "neurons do not fill a tile of 64",
    ):
        assert line in result.out
    out = refactored(command, models["olmoe"], tmp_path / "out")
    card = (out / "README.md").read_text()
    assert """"vllm_xargs": {"prism_k": 8}""" in card
    assert "- vLLM: runs it" in card
    tensors = sum(len(load_file(path)) for path in out.glob("model-*.safetensors"))
    planned = next(line for line in result.out.splitlines() if line.strip().startswith("tensors"))
    assert int(planned.split()[-1]) == tensors


@pytest.mark.parametrize(
    ("experts", "width", "vllm", "llama", "narrow"),
    [(992, 128, True, True, False), (1024, 64, False, True, False), (2048, 48, False, False, True), (64, 8, True, True, True)],
)
def test_engines_that_can_run_a_result_are_named(experts, width, vllm, llama, narrow):
    notes = engine_notes({"num_experts": experts, "num_experts_per_tok": 8, "intermediate_size": width}, Source("", "", "olmoe", {}))
    assert ["runs it" in note for note in notes[:2]] == [vllm, llama]
    assert all(("lower --sub-experts" in note) != ("runs it" in note) for note in notes[:2])
    assert any(f"of {width} neurons do not fill" in note for note in notes[2:]) == narrow


def test_engines_without_a_class_are_named():
    notes = engine_notes({"num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 64}, Source("", "", "beam", {}))
    assert [note.partition(" (")[0] for note in notes] == ["vLLM: has no class for beam", "llama.cpp: has no class for beam"]


def test_experts_without_tokens_are_reported_or_refused(tmp_path, command, models):
    source = shutil.copytree(models["olmoe"], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    # Of two opposite rows one is positive: with two such pairs no zero row is ever among the top two.
    name = "model.layers.1.mlp.gate.weight"
    tensors[name][2:4] = -tensors[name][:2]
    tensors[name][4:] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = refactored(command, source, tmp_path / "out", "--num-samples", "2")
    reports = json.loads((out / "prism.json").read_text())["layers"]
    assert reports[1]["unrouted"] == [4, 5]
    unrouted = [(layer["layer"], layer["unrouted"]) for layer in reports if layer["unrouted"]]
    result = command("prism-refactor", source, tmp_path / "out2", *FAST, "--num-samples", "2", "--strict")
    assert result.code == 3
    assert f"layer {unrouted[0][0]}: experts {unrouted[0][1]} saw no token (--strict)" in result.err
    assert not (tmp_path / "out2").exists()
    result = command("prism-refactor", source, tmp_path / "out2", *FAST, "--num-samples", "2", "--resume")
    assert f"warning: layer {unrouted[0][0]}: no token reached expert" in result.err
    assert command("prism-verify", source, out, "--num-samples", "1", "--max-seq-length", "32").code == 0


def damage_tensor(out, name, change):
    index = json.loads((out / "model.safetensors.index.json").read_text())
    path = out / index["weight_map"][name]
    tensors = load_file(path)
    change(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})


def flip(tensors, name):
    tensors[name].view(-1)[0] += 1


def shrink(tensors, name):
    tensors[name] = tensors[name][:, 1:].contiguous()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.0.mlp.experts.3.up_proj.weight", flip, "layer 0: its sub-experts are not the source's"),
        ("model.layers.1.self_attn.q_proj.weight", flip, "model.layers.1.self_attn.q_proj.weight is not the source's"),
        ("model.layers.1.mlp.experts.9.down_proj.weight", shrink, "model.layers.1.mlp.experts.9.down_proj.weight has shape"),
    ],
)
def test_verify_notices_a_wrong_tensor(tmp_path, models, command, name, change, message):
    out = refactored(command, models["olmoe"], tmp_path / "out")
    damage_tensor(out, name, change)
    result = command("prism-verify", models["olmoe"], out)
    assert result.code == 4
    assert message in result.err


def test_verify_notices_missing_and_extra_tensors_and_another_source(tmp_path, models, command):
    out = refactored(command, models["olmoe"], tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    result = command("prism-verify", models["olmoe"], out)
    assert result.code == 4
    assert "missing tensor model.norm.weight" in result.err
    other = build("olmoe", tmp_path / "other", initializer_range=0.1)
    result = command("prism-verify", other, out)
    assert result.code == 4
    assert "was made from another checkpoint" in result.err
    result = command("prism-verify", other, other)
    assert result.code == 3
    assert "not a refactored checkpoint" in result.err


def test_verify_notices_wrong_gates_by_their_logits(tmp_path, models, command):
    out = refactored(command, models["olmoe"], tmp_path / "out", "--router", "replicate")

    def scramble(tensors, name):
        tensors[name] = tensors[name].flip(0).contiguous()

    damage_tensor(out, "model.layers.1.mlp.gate.weight", scramble)
    result = command("prism-verify", models["olmoe"], out, "--json")
    assert result.code == 4
    assert "the stock gate is not the source's repeated" in result.err


@pytest.mark.parametrize(("value", "message"), [(None, "the stock gate is not the source's repeated"), (float("nan"), "is not finite")])
def test_verify_notices_a_wrong_stock_gate(tmp_path, models, command, value, message):
    out = refactored(command, models["olmoe"], tmp_path / "out")

    def spoil(tensors, name):
        tensors[name] = tensors[name].flip(0).contiguous() if value is None else torch.full_like(tensors[name], value)

    damage_tensor(out, "model.layers.1.mlp.gate.weight", spoil)
    result = command("prism-verify", models["olmoe"], out, "--json")
    assert result.code == 4
    assert message in result.err


def test_verify_compares_logits_that_are_not_numbers_as_different():
    rows = torch.zeros(1, 2, 3)
    comparison = verify._compare("two-level", lambda hidden: hidden, rows, rows * float("nan"), 1e-3)
    assert comparison.passed is False


def test_verify_obeys_the_tolerance(tmp_path, models, command):
    out = refactored(command, models["olmoe"], tmp_path / "out", "--router", "replicate")
    options = ["--num-samples", "2", "--max-seq-length", "64"]
    assert command("prism-verify", models["olmoe"], out, *options).code == 0
    result = command("prism-verify", models["olmoe"], out, *options, "--tolerance", "0")
    assert result.code == 4
    assert "not the same model at full k: stock max |logit difference| exceeds 0" in result.err


def drop(out, name):
    (out / name).unlink()


def spoil_router(out, name):
    tensors = load_file(out / name)
    tensors["model.layers.0.mlp.gate.weight"][0, 0, 0] = float("nan")
    save_file(tensors, out / name)


def unbalance(out, name):
    tensors = load_file(out / name)
    tensors["model.layers.1.mlp.gate.neuron_sub_expert"][0] = 0
    save_file(tensors, out / name)


@pytest.mark.parametrize(
    ("change", "name", "code", "message"),
    [
        (drop, "tokenizer.json", 4, "file tokenizer.json is not the source's"),
        (drop, "modeling_prism.py", 4, "file modeling_prism.py is missing"),
        (drop, ROUTER_FILE, 3, "sub_expert_router.safetensors: is missing"),
        (lambda out, name: (out / name).write_bytes(b"x" * 20), ROUTER_FILE, 3, "is missing or broken"),
        (lambda out, name: (out / name).write_text("{"), "prism.json", 3, "prism.json: is not as this version writes it (Invalid JSON"),
        (spoil_router, ROUTER_FILE, 4, "layer 0: a router tensor of"),
        (unbalance, ROUTER_FILE, 4, "layer 1: the partition in sub_expert_router.safetensors is not balanced"),
    ],
)
def test_verify_notices_a_wrong_file(tmp_path, models, command, change, name, code, message):
    out = refactored(command, models["olmoe"], tmp_path / "out")
    change(out, name)
    result = command("prism-verify", models["olmoe"], out)
    assert result.code == code
    assert message in result.err


def test_planning_leaves_the_checkpoints_config_alone(tmp_path, models):
    checkpoint = Checkpoint(models["olmoe"])
    checkpoint.config.dtype = torch.bfloat16
    make_plan(checkpoint, Recipe(), Calibration(), tmp_path / "out", True)
    assert checkpoint.config.dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_regression_on_few_observations_is_tame(tokens):
    rng = np.random.default_rng(0)
    weight, bias = ridge(rng.standard_normal((tokens, 64), dtype=np.float32), rng.random((tokens, 4), dtype=np.float32))
    predicted = rng.standard_normal((100, 64)) @ weight.T + bias
    assert predicted.min() > -1.5
    assert predicted.max() < 2.5


@pytest.mark.parametrize(("tokens", "features"), [(3000, 20), (60, 200)])
def test_regression_finds_what_scikit_learn_finds(tokens, features):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2 * tokens, features), dtype=np.float32)
    rows = rng.permutation(2 * tokens)[:tokens]
    # Few directions carry the target, so that it can be found with fewer observations than features too.
    inputs[:, 5:] *= 0.03
    target = (inputs[rows, :5] @ rng.standard_normal((5, 2)) + 3 + 0.1 * rng.standard_normal((tokens, 2))).astype(np.float32)
    weight, bias = ridge(inputs, target, rows)
    seen = inputs[rows].astype(np.float64)
    strengths = [strength * tokens * seen.var(0).mean() for strength in STRENGTHS]
    expected = RidgeCV(strengths).fit(seen, target.astype(np.float64))
    assert weight == pytest.approx(expected.coef_, abs=1e-4, rel=1e-3)
    assert bias == pytest.approx(expected.intercept_, abs=1e-4, rel=1e-3)


def test_compensation_takes_off_error_and_less_is_lost_at_every_k(elastic):
    for layer in json.loads((elastic / "prism.json").read_text())["layers"]:
        errors = layer["output_error"]
        assert errors["k"] == [4, 8, 12, 16]
        for ours, stock, theirs in list(zip(errors["two-level"], errors["stock"], errors["original"], strict=True))[:3]:
            assert ours < theirs / 2
            # Of equal rows the first ones win, which are copies of one expert.
            assert stock == pytest.approx(theirs, rel=1e-4)
        assert errors["two-level"][3] < 1e-9
    rows = token_rows([EVALUATION_TEXT], load_tokenizer(EXAMPLE), 4, 256, 0)
    model = attach(load(elastic), elastic)
    with_it = layer_errors_of(model, 4, rows)
    for block in moe_blocks(model):
        block.experts.two_level.map_out.zero_()
    for better, worse in zip(with_it, layer_errors_of(model, 4, rows), strict=True):
        assert better < worse
    for block in moe_blocks(model):
        del block.experts.two_level.compensation
    for better, worse in zip(with_it, layer_errors_of(model, 4, rows), strict=True):
        assert better < 0.85 * worse


@pytest.mark.long
@torch.inference_mode()
def test_regression_predicts_better_than_the_papers_proxy(tmp_path, command):
    errors = {}
    for router in ("proxy", "linear"):
        out = tmp_path / router
        options = ["--num-samples", "32", "--solver", "ascent", "--workers", "1", "--gate-neurons", "2", "--quiet"]
        assert command("prism-refactor", EXAMPLE, out, *options, "--router", router).code == 0
        layers = json.loads((out / "prism.json").read_text())["layers"]
        errors[router] = [layer["output_error"]["two-level"][1] for layer in layers]
        tensors = router_tensors(out / ROUTER_FILE)["model.layers.0.mlp"]
        assert ("gate_neurons" in tensors) == (router != "linear")
        assert router == "linear" or tensors["gate_neurons"].shape == (16, 4, 2)
    for paper, linear in zip(*errors.values(), strict=True):
        assert linear < paper


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--sub-experts", "3"], 2, "--sub-experts 3: must be a power of two"),
        (["--sub-experts", "1"], 2, "--sub-experts 1: must be a power of two"),
        (["--sub-experts", "32"], 2, "does not divide the expert width 16 (intermediate_size in config.json)"),
        (["--sub-experts", "8"], 2, "sub-experts of 2 neurons in torch.float32 are too narrow"),
        (["--keep", "4"], 2, "--keep 4: must be at least 1 and less than --sub-experts 4"),
        (["--max-shard-size", "many"], 2, "'many' is not a size; write 5GB or 512MiB"),
        (["--solver", "magic"], 2, "--solver"),
        (["--device", "cuda"], 2, "--device cuda: no CUDA device"),
        (["--stats", "nowhere"], 3, "nowhere: no such folder; make one with prism-profile"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, models, command, options, code, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    result = command("prism-refactor", models["olmoe"], tmp_path / "out", *options)
    assert result.code == code
    assert message in result.err
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_another_checkpoint_are_refused(tmp_path, models, command):
    assert command("prism-profile", models["olmoe-renormalised"], tmp_path / "stats", *FAST[:6]).code == 0
    result = command("prism-refactor", models["olmoe"], tmp_path / "out", "--stats", tmp_path / "stats")
    assert result.code == 3
    assert "was made from another checkpoint" in result.err
    result = command("prism-refactor", models["olmoe-renormalised"], tmp_path / "out", "--stats", tmp_path / "stats", "--num-samples", "3")
    assert result.code == 2
    assert "--num-samples has no effect with --stats" in result.err
    layer = tmp_path / "stats" / "layer-00001.safetensors"
    layer.write_bytes(layer.read_bytes()[:1000])
    result = command("prism-refactor", models["olmoe-renormalised"], tmp_path / "out", "--stats", tmp_path / "stats", "--workers", "1")
    assert result.code == 3
    assert "layer-00001.safetensors: missing or truncated" in result.err
    assert not (tmp_path / "out").exists()


def test_refactoring_twice_is_refused(tmp_path, models, command):
    out = refactored(command, models["olmoe"], tmp_path / "out")
    result = command("prism-refactor", out, tmp_path / "again")
    assert result.code == 3
    assert "is refactored already" in result.err


def test_overwrite_replaces_only_when_the_new_one_is_complete(tmp_path, models, command):
    out = refactored(command, models["olmoe"], tmp_path / "out")
    before = files(out)
    assert command("prism-refactor", models["olmoe"], out, *FAST).code == 2
    result = command("prism-refactor", models["olmoe"], out, *FAST, "--overwrite", "--dataset", "missing.jsonl")
    assert result.code == 3
    assert files(out) == before
    refactored(command, models["olmoe"], out, "--overwrite", "--seed", "1")
    assert files(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_disk_is_found_before_any_work(tmp_path, models, command, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    for name in ("prism-refactor", "prism-profile"):
        result = command(name, models["olmoe"], tmp_path / "out")
        assert result.code == 5
        assert "of disk, 0.0 KiB is free" in result.err
        assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path, models, command, monkeypatch):
    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("prism_refactor.tensors.save_file", full)
    for name in ("prism-refactor", "prism-profile"):
        result = command(name, models["olmoe"], tmp_path / "out", *FAST[:6], "--quiet")
        assert result.code == 5
        assert result.err.startswith("error: the disk is full")
    assert list(tmp_path.iterdir()) == []


def test_gate_neurons_are_the_papers():
    generator = torch.Generator().manual_seed(0)
    marks = (torch.rand(50, 24, generator=generator) > 0.4).float()
    labels = torch.randperm(24, generator=generator) % 3
    coactivation = marks.T @ marks
    for part, chosen in enumerate(gate_neurons(marks, labels, 3)):
        members = torch.nonzero(labels == part).flatten()
        totals = [sum(coactivation[c, other].item() for other in members) for c in members]
        best = sorted(range(len(members)), key=lambda position: -totals[position])[:4]
        assert chosen.tolist() == best


def test_a_model_that_gives_router_logits_and_predicts_further_tokens(tmp_path, command):
    """Its extra layer passes through and is switched off, because config.json has the sizes of the others."""
    source = build("glm4_moe", tmp_path / "source", num_nextn_predict_layers=1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1, "output_router_logits": True}))
    extra = {"model.layers.46.mlp.gate.weight": torch.ones(8, 32)}
    tensors = load_file(source / "model.safetensors") | extra
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = refactored(command, source, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    result = Checkpoint(out)
    with result.slices(extra) as slices:
        assert torch.equal(slices["model.layers.46.mlp.gate.weight"][...], torch.ones(8, 32))
    assert command("prism-verify", source, out, "--num-samples", "1", "--max-seq-length", "32").code == 0
