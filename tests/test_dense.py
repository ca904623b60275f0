"""Dense sources: a layer's feed-forward network is one expert of a family that is alike but for its experts."""

import json
import weakref

import pytest
import torch
from conftest import FAST, IMAGE_TOKENS, build, files, load, logits, mostly_long, quantise_fp8
from safetensors.torch import load_file, save_file
from test_resuming import stop_after
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from prism_refactor.calibration.profile import Profile
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.dense import TWINS, WRAPPERS, has_twin
from prism_refactor.models.layered import LayeredModel

WIDE = {"intermediate_size": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}
HEADS = WIDE | {"head_dim": 16}
# Scores without a sigmoid or logits with a factor of their own show in the flags; sizes are those that no default gives.
DENSE = {
    "cohere2": HEADS | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "logit_scale": 0.3},
    "ernie4_5": HEADS,
    "granite": WIDE | {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    # It makes the network narrower than the config says.
    "lfm2": WIDE | {"layer_types": ["conv", "full_attention"], "intermediate_size": 96, "block_multiple_of": 16},
    # Three heads that share a key, tied embeddings, as SmolLM2 has them.
    "llama": WIDE | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": WIDE | {"sliding_window": 16},
    "olmo2": WIDE | {"pad_token_id": None},
    "phi3": WIDE | {"pad_token_id": 0},
    "qwen2": WIDE | {"hidden_act": "gelu"},
    "qwen3": HEADS,
    "qwen3_5_text": HEADS
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "seed_oss": HEADS,
}


MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
QWEN_VISION = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "patch_size": 4}
QWEN_VISION |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
# Models of images and text around a dense one: of a family of their own, and of those that take any text model.
AROUND = {
    "qwen3_5": DENSE["qwen3_5_text"] | MROPE | {"vision": QWEN_VISION},
    "qwen3_vl": HEADS | MROPE | {"vision": QWEN_VISION},
    "llava": WIDE | {"text_type": "llama", "vision": VISION | {"model_type": "clip_vision_model"}},
    "mistral3": WIDE | {"text_type": "mistral", "head_dim": 8, "vision": VISION | {"model_type": "pixtral", "image_size": 32}},
    "internvl": WIDE | {"text_type": "qwen2", "vision": VISION | {"model_type": "internvl_vision", "image_size": [32, 32]}},
}


def dense(model_type, folder, **changes):
    return build(model_type, folder, **((DENSE | AROUND)[model_type] | {"model_type": model_type} | changes))


def test_every_family_of_the_table_is_tested():
    assert DENSE.keys() | {"qwen3_vl_text"} == TWINS.keys()
    assert AROUND.keys() > WRAPPERS.keys()


def test_models_of_sound_around_a_dense_one_are_not_read():
    assert not has_twin(AutoConfig.for_model("voxtral", text_config={"model_type": "llama"}))
    assert has_twin(AutoConfig.for_model("llava", text_config={"model_type": "llama"}))


def picture(model_type):
    """Text with a picture in it, of which every family makes four tokens, as arguments of the model."""
    generator = torch.Generator().manual_seed(0)
    ids, size = torch.randint(10, 3000, (1, 20), generator=generator), 16 if model_type == "llava" else 32
    ids[0, 5:9] = IMAGE_TOKENS["image_token_id"]
    if not model_type.startswith("qwen"):
        sizes = {"image_sizes": torch.tensor([[size, size]])} if model_type == "mistral3" else {}
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, size, size, generator=generator)} | sizes
    ids[0, 4], ids[0, 9] = IMAGE_TOKENS["vision_start_token_id"], IMAGE_TOKENS["vision_end_token_id"]
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    kinds = (ids == IMAGE_TOKENS["image_token_id"]).int()
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": kinds}


@pytest.mark.parametrize("model_type", mostly_long(AROUND, "qwen3_5", "llava"))
def test_a_dense_model_inside_one_of_images_and_text(tmp_path, command, model_type):
    source, out = dense(model_type, tmp_path / "dense"), tmp_path / "out"
    result = command("prism-refactor", source, out, "--sub-experts", 4, *FAST)
    assert result.code == 0, result.err
    verified = command("prism-verify", source, out)
    assert verified.code == 0, verified.out + verified.err
    text_type = json.loads((source / "config.json").read_text())["text_config"]["model_type"]
    read_as = TWINS[text_type][0]
    config, card = json.loads((out / "config.json").read_text()), (out / "README.md").read_text()
    assert config["model_type"] == WRAPPERS.get(model_type, model_type)
    assert config["text_config"]["model_type"] == read_as
    assert f"The original is a dense {text_type}; here it is a `{read_as}`" in card
    assert (f"vLLM: not tried: a {model_type} with a {read_as} inside" in card) == (model_type not in WRAPPERS)
    assert f"around a dense {text_type}, read as a {read_as} of one expert" in command("prism-profile", "--explain", source).out
    given = picture(model_type)
    with torch.inference_mode():
        original = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
        expected = original(**given).logits
        assert (original(**given | {"pixel_values": given["pixel_values"] + 1}).logits - expected).abs().max() > 0.01
        for model in (AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32), load(out)):
            assert (model(**given).logits - expected).abs().max() < 1e-4 * max(1, expected.std())


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_a_dense_model_saved_without_its_head(tmp_path, command, token_ids, model_type):
    source, out = dense(model_type, tmp_path / "dense", tie_word_embeddings=True), tmp_path / "out"
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), token_ids)
    edit_tensors(source, lambda name, value: (name.removeprefix("model."), value))
    result = command("prism-refactor", source, out, "--sub-experts", 4, *FAST)
    assert result.code == 0, result.err
    split = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    split.save_pretrained(tmp_path / "again")
    written = {name for path in out.glob("model-*.safetensors") for name in load_file(path)}
    assert written == load_file(tmp_path / "again" / "model.safetensors").keys()
    found = logits(split, token_ids)
    assert (found - expected).abs().max() < 1e-4 * max(1, expected.std())


@pytest.mark.parametrize("model_type", mostly_long(DENSE, "llama", "phi3", "lfm2", "qwen2"))
def test_a_dense_model_is_split_like_an_expert(tmp_path, command, token_ids, model_type):
    source, out = dense(model_type, tmp_path / "dense"), tmp_path / "out"
    result = command("prism-refactor", source, out, "--sub-experts", 4, *FAST)
    assert result.code == 0, result.err
    verified = command("prism-verify", source, out)
    assert verified.code == 0, verified.out + verified.err
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), token_ids)
    # Loaded as what it says it is, by transformers alone, and with the two-level router.
    for model in (AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), load(out)):
        assert (logits(model, token_ids) - expected).abs().max() < 1e-4 * max(1, expected.std())
    plan = command("prism-refactor", source, tmp_path / "other", "--sub-experts", 4, *FAST, "--dry-run").out
    written = sum(len(load_file(path)) for path in out.glob("model-*.safetensors"))
    assert int(next(line for line in plan.splitlines() if line.strip().startswith("tensors")).split()[-1]) == written
    manifest = json.loads((out / "prism.json").read_text())
    assert manifest["source"]["dense"] == model_type
    assert manifest["source"]["model_type"] == json.loads((out / "config.json").read_text())["model_type"] == TWINS[model_type][0]
    assert f"The original is a dense {model_type}" in (out / "README.md").read_text()


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_its_twin_is_the_dense_model(tmp_path, token_ids, model_type):
    source = dense(model_type, tmp_path / "dense")
    layered = LayeredModel(Checkpoint(source), torch.float32)
    for name in [name for name, _ in layered.model.named_children() if layered.tensors_under(name)]:
        layered.load(name)
    layered.model.tie_weights()
    layered.model.set_experts_implementation("eager")
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), token_ids)
    found = logits(layered.model, token_ids)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", mostly_long(("qwen3", "qwen3_vl", "llava"), "qwen3"))
def test_fp8_and_dense_at_once(tmp_path, command, model_type):
    twin = quantise_fp8(dense(model_type, tmp_path / "dense"), tmp_path / "quantised", block=(12, 20))
    for name in ("quantised", "twin"):
        assert command("prism-refactor", tmp_path / name, tmp_path / f"{name}-out", "--sub-experts", 4, *FAST).code == 0
    assert twin == tmp_path / "twin"
    found, expected = (
        {name: value for path in (tmp_path / f"{folder}-out").glob("*.safetensors") for name, value in load_file(path).items()}
        for folder in ("quantised", "twin")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_defaults_of_a_dense_model(tmp_path, command):
    source = dense("llama", tmp_path / "dense", intermediate_size=256)
    plan = command("prism-refactor", source, tmp_path / "out", "--dry-run")
    assert plan.code == 0, plan.err
    assert [line.split() for line in plan.out.splitlines()][1] == ["num_local_experts", "1", "16"]
    explained = command("prism-profile", "--explain", source)
    assert explained.code == 0, explained.err
    assert "a dense llama, read as a mixtral of one expert" in explained.out


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "k_proj.bias has no place in its twin, MixtralForCausalLM"),
        ("llama", {"mlp_bias": True}, "mlp.down_proj.bias has no place in its twin, MixtralForCausalLM"),
        ("gpt_neox", WIDE, "'gpt_neox' cannot be split: it has no experts; of dense models these can be: cohere2, "),
    ],
)
def test_what_has_no_twin_is_refused(tmp_path, command, model_type, changes, message):
    source = build(model_type, tmp_path / "dense", **(DENSE.get(model_type, {}) | {"model_type": model_type} | changes))
    result = command("prism-refactor", source, tmp_path / "out", *FAST)
    assert result.code == 3
    assert message in result.err
    assert len(result.err.splitlines()) == 1


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(edit(name, value) for name, value in tensors.items()), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "damage", "message"),
    [
        (
            "phi3",
            lambda folder: edit_config(folder, num_key_value_heads=1),
            "qkv_proj.weight has shape [64, 32], config.json says [48, 32]",
        ),
        (
            "llama",
            lambda folder: edit_config(folder, intermediate_size=128),
            "gate_proj.weight has shape [64, 48], config.json says [128, 48]",
        ),
        ("llama", lambda folder: edit_config(folder, num_hidden_layers=10**7), "num_hidden_layers is 10000000, the shards hold 2 layers"),
        ("llama", lambda folder: edit_config(folder, num_hidden_layers=0), "num_hidden_layers is 0"),
        ("llama", lambda folder: edit_config(folder, hidden_act="nonsense"), "'nonsense'"),
        ("llama", lambda folder: edit_config(folder, num_attention_heads=0), "integer modulo by zero"),
        ("llama", lambda folder: edit_config(folder, hidden_size=0), "cannot be split: "),
        (
            "llama",
            lambda folder: edit_tensors(folder, lambda name, value: (name, value.bfloat16() if "gate_proj" in name else value)),
            "are stored in BF16 and F32; convert the checkpoint to one type",
        ),
        (
            "phi3",
            lambda folder: edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "a part of each head has positions (partial_rotary_factor 0.5), and all of it in its twin",
        ),
        ("phi3", lambda folder: edit_config(folder, rope_parameters=LONG), "other factors behind a length (longrope)"),
        ("llava", lambda folder: edit_config(folder, vision_config={"model_type": "timm_wrapper"}), "transformers cannot build this model"),
    ],
)
def test_a_damaged_dense_checkpoint_is_refused_with_the_reason(tmp_path, command, model_type, damage, message):
    source = dense(model_type, tmp_path / "dense")
    damage(source)
    result = command("prism-refactor", source, tmp_path / "out", "--sub-experts", 4, *FAST)
    assert result.code == 3, result.err
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_statistics_of_a_layer_are_gone_when_the_next_runs(tmp_path, command, monkeypatch):
    """Memory is a layer, never two."""
    alive, made = [], []
    profile_layer = Profile._profile_layer

    def watched(self, stream, index):
        alive.append(sum(reference() is not None for reference in made))
        statistics = profile_layer(self, stream, index)
        made.append(weakref.ref(statistics))
        return statistics

    monkeypatch.setattr(Profile, "_profile_layer", watched)
    source = build("olmoe", tmp_path / "source", num_hidden_layers=4)
    assert command("prism-refactor", source, tmp_path / "out", *FAST).code == 0
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_layers_that_share_the_workers_resume_with_the_same_bytes(tmp_path, command, monkeypatch, layer):
    source = dense("llama", tmp_path / "dense", num_hidden_layers=5)
    options = [source, tmp_path / "out", *FAST[:-1], 2, "--quiet"]
    assert command("prism-refactor", source, tmp_path / "alone", *FAST, "--quiet").code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, layer, KeyboardInterrupt)
        assert command("prism-refactor", *options).code == 130
    resumed = command("prism-refactor", *options, "--resume")
    assert resumed.code == 0, resumed.err
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_every_command_takes_a_dense_source_or_its_result(tmp_path, command):
    source, out = dense("llama", tmp_path / "dense"), tmp_path / "out"
    assert command("prism-profile", source, tmp_path / "stats", *FAST[:6]).code == 0
    # A quarter of N is kept by default, so of 16 as many as 6 may be, which is more than there are otherwise.
    options = ["--sub-experts", 8, "--keep", 6, "--stats", tmp_path / "stats", *FAST[6:]]
    assert command("prism-refactor", source, out, *options).code == 0
    text = ["--num-tokens", "600", "--max-seq-length", "64", "--quiet"]
    evaluated = command("prism-eval", source, out, *text, "--k", "2,8", "--json")
    assert evaluated.code == 0, evaluated.err
    report = json.loads(evaluated.out)
    (original,) = report["original"]["points"]
    assert original["k"] == 1
    assert report["refactored"][-1]["points"][-1]["perplexity"] == pytest.approx(original["perplexity"], rel=1e-4)
    for memory in ("50%", "100%"):
        result = command("prism-run", out, "--prompt", "The", "--k", 3, "--max-new-tokens", 4, "--fast-memory", memory, "--quiet")
        assert result.code == 0, result.err
    result = command("prism-finetune", out, tmp_path / "tuned", "--steps", 1, *FAST[:4], "--quiet")
    assert result.code == 0, result.err
