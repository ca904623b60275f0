"""Checkpoints as other tools leave them: their keys, tokenizers, names, and what they write back."""

import copy
import json
import shutil

import pytest
import torch
from conftest import FAST, files
from safetensors.torch import load_file, save_file
from serving import fetch, served
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

import prism_refactor
from prism_refactor.cli.serve import _name_of
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.layered import LayeredModel
from prism_refactor.models.loading import end_tokens
from prism_refactor.models.side_files import side_files

SHORT = ["--num-samples", "2", "--max-seq-length", "32", "--quiet"]
IDS = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(models, tmp_path):
    """A copy of a small model."""
    return shutil.copytree(models["qwen3_moe"], tmp_path / "model")


@pytest.fixture(scope="module")
def refactored(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("refactored") / "out"
    prism_refactor.refactor(models["qwen3_moe"], out, workers=1, sub_experts=2, num_samples=8, max_seq_length=32)
    return out


def edit(path, **changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


LEFTOVERS = {
    "output_router_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "use_cache": False,
    "is_encoder_decoder": True,
}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "granitemoe", "jamba"])
@pytest.mark.parametrize("key", LEFTOVERS)
def test_keys_that_a_training_left_change_nothing(models, command, tmp_path, family, key):
    """In the source: its result is as without. In the result, where a training may leave them, too: every use is as without."""
    source, out = shutil.copytree(models[family], tmp_path / "source"), tmp_path / "out"
    edit(source / "config.json", **{key: LEFTOVERS[key]})
    assert command("prism-refactor", source, out, *FAST, "--quiet").code == 0
    assert json.loads((out / "config.json").read_text()).get(key) in (None, not LEFTOVERS[key])
    expected = logits(prism_refactor.load(out))
    edit(out / "config.json", **{key: LEFTOVERS[key]})
    result = command("prism-verify", source, out, *SHORT)
    assert result.code == 0, result.err
    loaded = prism_refactor.load(out)
    torch.testing.assert_close(logits(loaded), expected)
    prism_refactor.set_active(loaded, 3)
    assert loaded.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 14)
    trusted = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    torch.testing.assert_close(logits(trusted), expected)
    result = command("prism-eval", source, out, "--k", "2", "--num-tokens", "100", "--max-seq-length", "32", "--quiet")
    assert result.code == 0, result.err
    if family != "jamba":
        result = command("prism-run", out, "--prompt", "The river", "--max-new-tokens", "2", "--quiet")
        assert result.code == 0, result.err


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"num_beams": 4},
        {"stop_strings": ["e"]},
        {"return_dict_in_generate": True, "output_scores": True},
        {"do_sample": True, "temperature": 0.1, "top_k": 5},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
        {"cache_implementation": "static"},
        {"max_length": 3},
        {"bad_words_ids": [[5]], "suppress_tokens": [6], "forced_eos_token_id": 2},
        {"assistant_confidence_threshold": 0.4, "num_assistant_tokens": 20, "prompt_lookup_num_tokens": 3},
        {"eos_token_id": None, "pad_token_id": None},
        {"eos_token_id": [2, 3], "pad_token_id": -1},
        {"max_time": 0.000001},
        {"num_return_sequences": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_generation_config_says_no_more_than_where_a_text_ends(refactored, tmp_path, command, settings):
    out = shutil.copytree(refactored, tmp_path / "out")
    answers = []
    for left in (None, settings):
        (out / "generation_config.json").unlink(missing_ok=True)
        if left is not None:
            (out / "generation_config.json").write_text(json.dumps(left))
        result = command("prism-run", out, "--prompt", "The river", "--max-new-tokens", "6", "--quiet", "--json")
        assert result.code == 0, result.err
        answers.append(json.loads(result.out)["answers"][0]["text"])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "\ufeff{}",
        "[]",
        "null",
        '"x"',
        *(f'{{"eos_token_id": {value}}}' for value in ('"2"', "2.5", '[2, "5"]', "[[2]]", "-1", "true")),
    ],
)
def test_a_broken_generation_config_is_named_at_once(models, refactored, tmp_path, command, text):
    for name, source, more in (
        ("prism-refactor", models["qwen3_moe"], [tmp_path / "other"]),
        ("prism-run", refactored, ["--prompt", "x"]),
        ("prism-serve", refactored, []),
    ):
        folder = shutil.copytree(source, tmp_path / name)
        (folder / "generation_config.json").write_text(text)
        result = command(name, folder, *more, "--quiet")
        assert (result.code, result.err.count("\n")) == (3, 1), result.err
        assert "generation_config.json" in result.err


def test_a_text_ends_at_the_tokenizers_end_too(refactored, tmp_path, command):
    """Where generation_config.json names another token, both end it."""
    out = shutil.copytree(refactored, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    first = json.loads(command("prism-run", out, "--prompt", "The river", "--max-new-tokens", "8", "--quiet", "--json").out)["answers"][0]
    generated = prism_refactor.load(out).generate(
        tokenizer("The river", return_tensors="pt").input_ids, max_new_tokens=8, do_sample=False, pad_token_id=0
    )[0]
    prompt = len(tokenizer("The river").input_ids)
    assert first["tokens"] == 8 == len(generated) - prompt
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 4095}))
    name = tokenizer.convert_ids_to_tokens(int(generated[prompt + 2]))
    edit(out / "tokenizer_config.json", eos_token=name)
    again = json.loads(command("prism-run", out, "--prompt", "The river", "--max-new-tokens", "8", "--quiet", "--json").out)["answers"][0]
    assert again["tokens"] <= 3
    with served(out, ends=end_tokens(AutoTokenizer.from_pretrained(out).eos_token_id)) as (_, url):
        body = {"model": "tiny", "prompt": "The river", "max_tokens": 8, "temperature": 0}
        (choice,) = fetch(f"{url}/v1/completions", body)[1]["choices"]
    assert choice["finish_reason"] == "stop"


def tokenizer_of(folder):
    return json.loads((folder / "tokenizer.json").read_text())


@pytest.mark.parametrize("way", ["a word", "the end of text", "a name that is used", "a smaller model"])
@pytest.mark.parametrize("name", ["prism-refactor", "prism-profile", "prism-eval"])
def test_a_tokenizer_of_another_model_is_refused_before_any_work(model, tmp_path, command, way, name):
    data = tokenizer_of(model)
    if way == "a word":
        data["model"]["vocab"]["riverbank"] = 5000
    elif way == "a smaller model":
        edit(model / "config.json", vocab_size=4095)
        weights = load_file(model / "model.safetensors")
        save_file(
            {key: value[:4095].clone() if len(value) == 4096 else value for key, value in weights.items()}, model / "model.safetensors"
        )
    else:
        token = "<end>" if way == "the end of text" else "river"
        special = way == "the end of text"
        data["added_tokens"].append(
            {"id": 5000, "content": token, "special": special, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        )
        if special:
            edit(model / "tokenizer_config.json", eos_token="<end>")
    (model / "tokenizer.json").write_text(json.dumps(data))
    before = sorted(tmp_path.iterdir())
    arguments = [
        model,
        *([tmp_path / "out"] if name != "prism-eval" else []),
        *(["--num-tokens", "300"] if name == "prism-eval" else FAST[:-4]),
    ]
    result = command(name, *arguments, "--quiet")
    assert (result.code, result.err.count("\n")) == (3, 1), result.err
    assert "the tokenizer has a token" in result.err
    assert sorted(tmp_path.iterdir()) == before


def test_a_padding_token_that_no_text_has_is_no_fault(model, tmp_path, command):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad-beyond>", special=True)})
    tokenizer.save_pretrained(model)
    assert command("prism-profile", model, tmp_path / "stats", *SHORT).code == 0
    (tmp_path / "text.txt").write_text("The river <pad-beyond> runs " * 50)
    result = command("prism-profile", model, tmp_path / "other", *SHORT, "--dataset", tmp_path / "text.txt")
    assert (result.code, "<pad-beyond>" in result.err) == (3, True)


@pytest.mark.parametrize("name", ["prism-refactor", "prism-profile", "prism-eval", "prism-run", "prism-serve"])
def test_a_missing_tokenizer_is_named(models, refactored, tmp_path, command, name):
    folder = shutil.copytree(refactored if name in ("prism-run", "prism-serve") else models["qwen3_moe"], tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    more = {"prism-refactor": [tmp_path / "out"], "prism-profile": [tmp_path / "out"], "prism-run": ["--prompt", "x"]}.get(name, [])
    result = command(name, folder, *more, "--quiet")
    assert (result.code, result.err.count("\n"), "tokenizer" in result.err) == (3, 1, True), result.err


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_so_is_that_of_every_family(models, tmp_path, command, family):
    folder = shutil.copytree(models[family], tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    result = command("prism-refactor", folder, tmp_path / "out", "--quiet")
    assert (result.code, "the tokenizer is missing" in result.err) == (3, True), result.err


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_of_a_tokenizer_is_named(model, tmp_path, command, name):
    (model / name).write_text("{ broken")
    result = command("prism-refactor", model, tmp_path / "out", "--quiet")
    assert (result.code, result.err.count("\n")) == (3, 1)
    assert f"{name}: cannot be read as JSON" in result.err


@pytest.mark.parametrize("noted", ["float16", "float32", None])
def test_a_type_that_config_json_does_not_tell_rightly(models, tmp_path, command, noted):
    """The result says how it is stored, so that every way to load it agrees."""
    source, out = shutil.copytree(models["qwen3_moe"], tmp_path / "source"), tmp_path / "out"
    weights = {name: value.bfloat16() for name, value in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    values = json.loads((source / "config.json").read_text()) | {"dtype": noted, "torch_dtype": noted}
    (source / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    assert command("prism-refactor", source, out, *FAST, "--sub-experts", "2", "--quiet").code == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert prism_refactor.load(out).dtype == torch.bfloat16
    result = command("prism-run", out, "--prompt", "The river", "--max-new-tokens", "2", "--quiet")
    assert result.code == 0, result.err


def test_an_adapter_beside_the_weights_is_not_passed_over(model, tmp_path, command):
    (model / "adapter_config.json").write_text("{}")
    result = command("prism-refactor", model, tmp_path / "out", "--dry-run", "--quiet")
    assert (result.code, "adapter_config.json: holds an adapter; merge it" in result.err) == (3, True), result.err


def test_a_model_that_is_saved_again_keeps_its_router(refactored, tmp_path):
    """Through whatever it was loaded and whatever became of it: other weights, another type, a copy."""
    expected = logits(prism_refactor.load(refactored))

    def saved(model, name):
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    trusted = AutoModelForCausalLM.from_pretrained(refactored, trust_remote_code=True)
    ways = {
        "load": prism_refactor.load(refactored),
        "trusted": trusted,
        "copy": copy.deepcopy(prism_refactor.load(refactored)),
        "attached": prism_refactor.attach(AutoModelForCausalLM.from_pretrained(refactored), refactored),
        "again": prism_refactor.load(saved(trusted, "first")),
    }
    for name, model in ways.items():
        folder = saved(model, name)
        for again in (prism_refactor.load(folder), AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)):
            assert torch.equal(logits(again), expected), name
            prism_refactor.set_active(again, 1)
            assert not torch.equal(logits(again), expected)
    # Onto itself, with another type, with changed weights.
    saved(prism_refactor.load(tmp_path / "load"), "load")
    assert torch.equal(logits(prism_refactor.load(tmp_path / "load")), expected)
    halved = prism_refactor.load(saved(prism_refactor.load(refactored).to(torch.bfloat16), "type"))
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(logits(halved), expected, atol=0.1, rtol=0)
    changed = prism_refactor.load(refactored)
    changed.lm_head.weight.data.mul_(2)
    torch.testing.assert_close(logits(prism_refactor.load(saved(changed, "changed"))), 2 * expected)


def test_a_model_whose_folder_is_gone_is_not_saved_without_its_router(refactored, tmp_path):
    moved = shutil.copytree(refactored, tmp_path / "out")
    model = prism_refactor.load(moved)
    (moved / "sub_expert_router.safetensors").unlink()
    with pytest.raises(OSError, match=r"sub_expert_router\.safetensors is gone"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_that_was_saved_without_its_router_says_so(refactored, tmp_path, command):
    AutoModelForCausalLM.from_pretrained(refactored).save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(refactored / name, tmp_path / "saved")
    for name, more in (("prism-run", ["--prompt", "x"]), ("prism-serve", [])):
        result = command(name, tmp_path / "saved", *more, "--quiet")
        assert (result.code, result.err.count("\n")) == (3, 1)
        assert "sub_expert_router.safetensors: is missing; copy it from the folder that prism-refactor wrote" in result.err


def test_what_a_training_left_is_not_copied(model, tmp_path, command):
    for name in ("checkpoint-10/config.json", "checkpoint-10/optimizer.pt", "runs/a/events.out.tfevents.1", "trainer_state.json", "latest"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("x" * 100)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("x")
    assert {str(path) for path in side_files(model)} >= {"additional_chat_templates/tool.jinja", "tokenizer.json"}
    assert command("prism-refactor", model, tmp_path / "out", *FAST, "--quiet").code == 0
    assert not any("checkpoint-10" in name or "tfevents" in name or "trainer" in name for name in files(tmp_path / "out"))


def rename(folder, change):
    """Change the names of all tensors; None leaves one out."""
    weights = load_file(folder / "model.safetensors")
    renamed = {change(name): value.clone() for name, value in weights.items() if change(name)}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


INSIDE = {
    "layers.1._orig_mod.": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "_fsdp_wrapped_module.": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "_checkpoint_wrapped_module.": lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "base_layer": lambda name: name.replace("q_proj.", "q_proj.base_layer."),
    "modules_to_save": lambda name: name.replace("lm_head.", "lm_head.modules_to_save.default."),
    "weight_orig": lambda name: name.replace("q_proj.weight", "q_proj.weight_orig"),
    "parametrizations": lambda name: name.replace("q_proj.weight", "q_proj.parametrizations.weight.original"),
    "language_model": lambda name: name.replace("model.", "model.language_model."),
}


@pytest.mark.parametrize("way", INSIDE)
def test_wrappers_inside_names_are_told(model, tmp_path, command, way):
    rename(model, INSIDE[way])
    result = command("prism-refactor", model, tmp_path / "out", "--dry-run", "--quiet")
    assert (result.code, result.err.count("\n")) == (3, 1)
    assert "called otherwise" in result.err
    assert way in result.err


def test_a_reward_model_is_called_one(model, tmp_path, command):
    rename(model, lambda name: name.replace("lm_head", "score"))
    result = command("prism-refactor", model, tmp_path / "out", "--dry-run", "--quiet")
    assert (result.code, "a classifier or a reward model" in result.err) == (3, True), result.err


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", None])
def test_quantisation_that_is_noted_and_not_there_is_told(model, tmp_path, command, method):
    edit(model / "config.json", quantization_config={"quant_method": method, "bits": 4})
    result = command("prism-refactor", model, tmp_path / "out", "--dry-run", "--quiet")
    assert (result.code, "no tensor is; remove quantization_config" in result.err) == (3, True), result.err


@pytest.mark.parametrize(
    ("text", "says"), [("{% for m in messages %}", "is no template"), ("", "it is empty"), (b"\xe9{{", "is no template")]
)
def test_a_chat_template_is_read_at_the_start(refactored, tmp_path, command, text, says):
    path = tmp_path / "chat.jinja"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = command("prism-serve", refactored, "--chat-template", path, "--quiet")
    assert (result.code, result.err.count("\n"), says in result.err) == (2, 1, True), result.err


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "_orig_mod.module.", "student."])
def test_a_prefix_is_named_with_its_remedy(model, tmp_path, command, prefix):
    rename(model, lambda name: prefix + name)
    result = command("prism-refactor", model, tmp_path / "out", "--dry-run", "--quiet")
    assert (result.code, result.err.count("\n")) == (3, 1)
    assert f"{prefix}lm_head.weight for lm_head.weight" in result.err
    assert "unwrapped or merged" in result.err


def test_of_two_tied_tensors_a_quantised_one_is_enough(models, tmp_path):
    """The head, stored as FP8 with its scales, is read as the embedding."""
    source = shutil.copytree(models["olmoe"], tmp_path / "source")
    weights = {name: value.clone() for name, value in load_file(source / "model.safetensors").items()}
    embedding = weights.pop("model.embed_tokens.weight").float()
    weights.pop("lm_head.weight", None)
    scales = embedding.abs().amax(1, keepdim=True).clamp_min(1e-6) / 448
    weights |= {"lm_head.weight": (embedding / scales).to(torch.float8_e4m3fn), "lm_head.weight_scale_inv": scales}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    edit(source / "config.json", quantization_config={"quant_method": "fp8"})
    checkpoint = Checkpoint(source)
    LayeredModel(checkpoint, None).check()
    with checkpoint.slices(["model.embed_tokens.weight"]) as slices:
        torch.testing.assert_close(slices["model.embed_tokens.weight"][:].float(), embedding, atol=1e-3, rtol=0.1)


@pytest.mark.parametrize("way", ["without a prefix", "a prefix twice", "the head alone", "the embedding alone", "both", "fused experts"])
def test_what_transformers_loads_is_loaded(models, tmp_path, command, way):
    source, out = shutil.copytree(models["olmoe"], tmp_path / "source"), tmp_path / "out"
    original = AutoModelForCausalLM.from_pretrained(source)
    weights = {name: value.clone() for name, value in load_file(source / "model.safetensors").items()}
    embedding = weights.pop("lm_head.weight", None)
    embedding = weights.pop("model.embed_tokens.weight", embedding)
    if way == "fused experts":
        weights = {name: value for name, value in original.state_dict().items() if name != "lm_head.weight"}
    weights |= {"lm_head.weight": embedding} if way in ("the head alone", "both") else {}
    weights |= {"model.embed_tokens.weight": embedding.clone()} if way != "the head alone" else {}
    if way == "a prefix twice":
        weights = {name.replace("model.", "model.model."): value for name, value in weights.items()}
    if way == "without a prefix":
        weights = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file({name: value.contiguous() for name, value in weights.items()}, source / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(source)), logits(original))
    result = command("prism-refactor", source, out, *FAST, "--quiet")
    assert result.code == 0, result.err
    torch.testing.assert_close(logits(prism_refactor.load(out)), logits(original), atol=1e-4, rtol=0)
    result = command("prism-verify", source, out, *SHORT)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("ends", "note"),
    [
        ((".qweight", ".qzeros", ".scales"), "quantize_config.json"),
        ((".qweight", ".qzeros", ".scales"), "quant_config.json"),
        ((".weight_packed", ".weight_scale"), None),
        ((".weight", ".weight_scale_inv"), "hf_quant_config.json"),
        ((".weight", ".weight.absmax"), None),
        ((".weight", ".SCB"), None),
    ],
)
def test_quantisation_that_config_json_does_not_note_is_told(model, tmp_path, command, ends, note):
    weights = load_file(model / "model.safetensors")
    for name in [name for name in weights if ".experts." in name]:
        value = weights.pop(name)
        weights |= {name.removesuffix(".weight") + end: torch.zeros(8, 8, dtype=torch.int32) for end in ends}
        if ends[0] == ".weight":
            weights[name] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    if note:
        (model / note).write_text("{}")
    result = command("prism-refactor", model, tmp_path / "out", "--dry-run", "--quiet")
    assert (result.code, result.err.count("\n")) == (3, 1)
    assert "quantised" in result.err
    assert note is None or note in result.err


def test_quantisation_under_its_old_key_is_read_as_such(model, tmp_path, command):
    edit(model / "config.json", compression_config={"format": "marlin-24"})
    result = command("prism-refactor", model, tmp_path / "out", "--dry-run", "--quiet")
    assert "quantised by 'compressed-tensors'" in result.err


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_one(model, tmp_path, command, name):
    (model / name).write_text(POINTER)
    result = command("prism-refactor", model, tmp_path / "out", "--dry-run", "--quiet")
    assert (result.code, "pointer of Git LFS" in result.err, "git lfs pull" in result.err) == (3, True, True), result.err


@pytest.mark.parametrize("name", ["sub_expert_router.safetensors", "prism.json", "model-00001-of-00005.safetensors", "tokenizer.json"])
def test_so_is_one_in_a_result(refactored, tmp_path, command, name):
    out = shutil.copytree(refactored, tmp_path / "out")
    assert (out / name).exists()
    (out / name).write_text(POINTER)
    for command_name, more in (("prism-run", ["--prompt", "x"]), ("prism-serve", [])):
        result = command(command_name, out, *more, "--quiet")
        assert (result.code, "pointer of Git LFS" in result.err) == (3, True), result.err


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter; merge it"),
        (["model-00001-of-00002.safetensors"], "index.json is missing"),
        (["consolidated.safetensors"], "it has consolidated.safetensors"),
        (["model-Q4_K_M.gguf"], "it has model-Q4_K_M.gguf"),
        (["pytorch_model.bin"], "pickled weights"),
    ],
)
def test_weights_of_another_kind_are_named(model, tmp_path, command, names, says):
    (model / "model.safetensors").unlink()
    for name in names:
        (model / name).write_text("{}")
    result = command("prism-refactor", model, tmp_path / "out", "--dry-run", "--quiet")
    assert (result.code, says in result.err) == (3, True), result.err


def test_the_folder_above_a_snapshot_is_led_down(model, refactored, tmp_path, command):
    snapshot = tmp_path / "models--org--Small-MoE" / "snapshots" / "0123456789abcdef"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(refactored, snapshot)
    cache = snapshot.parents[1]

    def said():
        result = command("prism-refactor", cache, tmp_path / "out", "--dry-run", "--quiet")
        assert (result.code, result.err.count("\n")) == (3, 1)
        return result.err

    assert "but inside: snapshots/0123456789abcdef; give that folder" in said()
    # An older one beside it: what the cache calls its newest, or both.
    shutil.copytree(refactored, snapshot.with_name("ffff"))
    assert "inside: snapshots/0123456789abcdef, snapshots/ffff" in said()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123456789abcdef")
    assert "inside: snapshots/0123456789abcdef; give" in said()
    assert _name_of(snapshot) == "Small-MoE"


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "all its 2 layers are dense, as config.json says (mlp_only_layers [0, 1]"),
        ("qwen3_moe", {"decoder_sparse_step": 5}, "decoder_sparse_step 5"),
        ("deepseek_v3", {"first_k_dense_replace": 3}, "all layers are dense, or one of the two is of another model"),
    ],
)
def test_a_mixture_of_experts_without_experts_is_told_why(models, tmp_path, command, family, changes, says):
    source = shutil.copytree(models[family], tmp_path / "source")
    edit(source / "config.json", **changes)
    weights = load_file(source / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if ".experts." not in name and ".gate." not in name}, source / "model.safetensors"
    )
    result = command("prism-refactor", source, tmp_path / "out", "--dry-run", "--quiet")
    assert (result.code, says in result.err) == (3, True), result.err


@pytest.mark.parametrize(("text", "size"), [("2G", 2**31), ("512M", 2**29), ("1.5g", 3 * 2**29), ("1TB", 10**12), ("64k", 2**16)])
def test_sizes_as_people_write_them(text, size):
    assert prism_refactor.resources.parse_size(text) == size


def test_an_empty_text_config_is_named(model, tmp_path, command):
    edit(model / "config.json", text_config={})
    result = command("prism-refactor", model, tmp_path / "out", "--dry-run", "--quiet")
    assert (result.code, "has no text_config; remove it" in result.err) == (3, True), result.err


def test_a_checkpoint_that_is_opened_runs_plainly(model):
    edit(model / "config.json", **LEFTOVERS)
    config = Checkpoint(model).config
    assert all(getattr(config, key) == (not value) for key, value in LEFTOVERS.items())


def test_a_server_of_a_model_with_leftovers_answers(refactored, tmp_path):
    out = shutil.copytree(refactored, tmp_path / "out")
    edit(out / "config.json", **LEFTOVERS)
    with served(out) as (_, url):
        assert fetch(f"{url}/v1/completions", {"model": "tiny", "prompt": "The river", "max_tokens": 3})[0] == 200
