import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLE, FAMILIES, FAST, IN_PLACE, build, files, load
from safetensors.torch import load_file, save_file

from prism_refactor.errors import InputError, UsageError
from prism_refactor.files import check_target, output_folder
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.experts import experts_forward
from prism_refactor.models.layered import LayeredModel
from prism_refactor.models.modeling_prism import moe_block, places
from prism_refactor.models.side_files import side_files
from prism_refactor.models.transformers_models import FusedExperts
from prism_refactor.models.writer import BLOCK, ShardWriter


@pytest.mark.parametrize("family", FAMILIES | IN_PLACE)
def test_loading_layer_by_layer_gives_the_weights_that_transformers_loads(models, family):
    expected = load(models[family]).state_dict()
    layered = LayeredModel(Checkpoint(models[family]), torch.float32)
    for index in range(len(layered.layers)):
        name = layered.layer_name(index)
        with layered.loaded(name):
            state = layered.model.get_submodule(name).state_dict()
            assert state
            for leaf, value in state.items():
                assert torch.equal(value, expected[f"{name}.{leaf}"])
    assert all(parameter.is_meta for parameter in layered.model.parameters())


def test_types_on_disk_are_kept_when_asked(tmp_path, models):
    folder = shutil.copytree(models["olmoe"], tmp_path / "mixed")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: value.float() if ".gate.weight" in name else value.bfloat16() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layered = LayeredModel(Checkpoint(folder), None)
    with layered.loaded("model.layers.0"):
        block = layered.layers[0].mlp
        assert block.gate.weight.dtype == torch.float32
        assert block.experts.down_proj.dtype == torch.bfloat16
        assert torch.equal(block.experts.down_proj[1], tensors["model.layers.0.mlp.experts.1.down_proj.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_sub_experts_add_up_to_the_expert(models, family):
    """Whatever the layout, the biases and the factor: N sub-experts, each with 1 / factor of the weight, give the expert's output."""
    layered = LayeredModel(Checkpoint(models[family]), torch.float32)
    index = next(index for index, layer in enumerate(layered.layers) if moe_block(layer))
    with layered.loaded(layered.layer_name(index)):
        experts = moe_block(layered.layers[index])[1].experts
        total, hidden, neurons = FusedExperts(experts).shape
        generator = torch.Generator().manual_seed(0)
        order = torch.stack([torch.randperm(neurons, generator=generator) for _ in range(total)])
        architecture = layered.checkpoint.architecture
        factor, held = architecture.factor(4), places(total, 4, architecture.groups(layered.checkpoint.config))
        parts = copy.deepcopy(experts)
        for name, value in FusedExperts(experts).split(order, held, factor).items():
            setattr(parts, name, torch.nn.Parameter(value))
        inputs = torch.randn(7, hidden, generator=generator)
        parts.num_experts = 4 * total
        for expert in range(total):
            whole = experts_forward(experts, inputs, torch.full((7, 1), expert), torch.ones(7, 1))
            chosen = held[expert].expand(7, 4)
            split = experts_forward(parts, inputs, chosen, torch.full((7, 4), 1 / factor))
            torch.testing.assert_close(split, whole)


def test_fp16_overflow_is_refused(tmp_path):
    folder = build("mixtral", tmp_path / "model")
    layered = LayeredModel(Checkpoint(folder), torch.float16)
    with layered.loaded(layered.layer_name(0)):
        experts = moe_block(layered.layers[0])[1].experts
        experts.down_proj.data.fill_(4e4)
        with pytest.raises(InputError, match="overflows"):
            FusedExperts(experts).split(torch.arange(32).repeat(4, 1), places(4, 2), 2)


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def write_index(folder, **index):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_tensor(folder, name="model.layers.1.mlp.experts.2.up_proj.weight"):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def spoil_tensor(folder, name):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


DAMAGE = [
    (shutil.rmtree, "no such folder"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors and no model.safetensors.index.json"),
    (truncate, "model.safetensors: truncated or not a safetensors file"),
    (write_index, "model.safetensors.index.json: has no weight_map"),
    (lambda folder: write_index(folder, weight_map={"a": "../model.safetensors"}), "is not the name of a file in the same folder"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json: holds no JSON object"),
    (
        lambda folder: write_index(folder, weight_map={"lm_head.weight": "model-00002-of-00002.safetensors"}),
        "model-00002-of-00002.safetensors: shard is missing",
    ),
    (
        lambda folder: change_config(folder, model_type="gpt_neox"),
        "model_type 'gpt_neox' cannot be split: it has no experts; of dense models these can be: cohere2, ",
    ),
    (lambda folder: change_config(folder, model_type="nonsense"), "config.json: transformers cannot read it"),
    (
        lambda folder: change_config(folder, quantization_config={"quant_method": "fp8"}),
        "says that it is quantised by 'fp8', and no tensor is",
    ),
    (lambda folder: change_config(folder, intermediate_size=32), "has shape [32, 16], config.json says [32, 32]"),
    (drop_tensor, "tensor model.layers.1.mlp.experts.2.up_proj.weight is missing"),
    (lambda folder: drop_tensor(folder, "model.norm.weight"), "tensor model.norm.weight is missing"),
    (lambda folder: change_config(folder, tie_word_embeddings=False), "tensor lm_head.weight is missing"),
    (lambda folder: change_config(folder, hidden_act="nope"), "transformers cannot build a language model of it"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "the tokenizer is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_broken_checkpoints_are_refused_in_one_line(tmp_path, models, command, damage, message):
    folder = shutil.copytree(models["olmoe"], tmp_path / "model")
    damage(folder)
    before = files(tmp_path)
    result = command("prism-refactor", folder, tmp_path / "out", "--quiet", *FAST)
    assert result.code == 3
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert command("prism-profile", folder, tmp_path / "out", "--quiet").code == 3
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.0.down_proj.weight"])
def test_weights_that_are_not_numbers_are_refused(tmp_path, models, command, name):
    folder = shutil.copytree(models["olmoe"], tmp_path / "model")
    spoil_tensor(folder, name)
    result = command("prism-refactor", folder, tmp_path / "out", "--quiet", *FAST)
    assert result.code == 3
    assert "not finite" in result.err
    assert not (tmp_path / "out").exists()


def test_shards_respect_the_limit_and_the_layers(tmp_path):
    writer = ShardWriter(tmp_path, 100)
    for name, size in (("a", 10), ("b", 10), ("c", 10), ("d", 40)):
        writer.add(name, torch.ones(size))
    writer.close_shard()
    writer.add("e", torch.ones(1))
    writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [[name for name, file in index["weight_map"].items() if file == f"model-{n:05d}-of-00004.safetensors"] for n in range(1, 5)]
    assert shards == [["a", "b"], ["c"], ["d"], ["e"]]
    assert index["metadata"]["total_size"] == 4 * 71
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())


@pytest.mark.parametrize("layer", [7, 12345])
def test_data_of_a_shard_begin_at_a_block(tmp_path, layer):
    writer = ShardWriter(tmp_path, 10**9)
    for number in range(40):
        writer.add(f"layers.{layer}.experts.{number}.weight", torch.full((64, 32 * (1 + number % 3)), number, dtype=torch.bfloat16))
    writer.add("größe", torch.ones(1024))
    writer.finish()
    (path,) = tmp_path.glob("*.safetensors")
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + length) % BLOCK == 0
    header = json.loads(path.read_bytes()[8 : 8 + length])
    starts = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    assert all(start % BLOCK == 0 for start in starts.values())
    tensors = load_file(path)
    assert all((tensors[f"layers.{layer}.experts.{number}.weight"] == number).all() for number in range(40))


def test_output_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "out"

    def fail():
        with output_folder(target) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with output_folder(target) as folder:
        (folder / "whole").write_text("x")
        assert not target.exists()
        with pytest.raises(InputError, match="another run is writing"), output_folder(target):
            pass
    assert files(tmp_path) == {"out/whole": b"x"}


def test_an_interrupted_sync_or_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    def write():
        with output_folder(target):
            pass

    rename = Path.rename
    stops = {
        "prism_refactor.files.sync": interrupted,
        "pathlib.Path.rename": lambda path, to: interrupted() if path.name == "out.partial" else rename(path, to),
    }
    for name, stop in stops.items():
        with monkeypatch.context() as patch:
            patch.setattr(name, stop)
            with pytest.raises(KeyboardInterrupt):
                write()
        assert files(tmp_path) == {"out/old": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_run_are_replaced_but_not_a_strangers_folder(tmp_path):
    leftover = tmp_path / "out.partial"
    leftover.mkdir()
    (leftover / ".incomplete").touch()
    (leftover / "old").touch()
    with output_folder(tmp_path / "out") as folder:
        assert not (folder / "old").exists()
    (tmp_path / "out2.partial").mkdir()
    with pytest.raises(UsageError, match="in the way"), output_folder(tmp_path / "out2"):
        pass
    assert (tmp_path / "out2.partial").exists()


def test_targets_that_would_lose_something_are_refused(tmp_path):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, file in ((ours, "prism.json"), (theirs, "thesis.txt")):
        folder.mkdir()
        (folder / file).touch()
    for target, overwrite, message in (
        (source, True, "must be outside"),
        (source / "inner", True, "must be outside"),
        (tmp_path, True, "must be outside"),
        (ours, False, "add `overwrite`"),
        (theirs, True, "was not written by this command"),
        (tmp_path / "no" / "where", False, "create it first"),
    ):
        with pytest.raises(UsageError, match=message):
            check_target(target, source, overwrite, "prism.json")
    check_target(ours, source, True, "prism.json")
    check_target(tmp_path / "new", source, False, "prism.json")


def test_side_files_are_everything_but_weights_and_config(tmp_path):
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "chat_template.jinja", ".secret"):
        (tmp_path / name).touch()
    for name in ("code/modeling_x.py", ".git/HEAD"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert [str(path) for path in side_files(tmp_path)] == ["chat_template.jinja", "code/modeling_x.py"]


def test_fingerprint_tells_checkpoints_apart(tmp_path, models):
    other = build("olmoe", tmp_path / "other", initializer_range=0.21)
    assert Checkpoint(other).fingerprint() != Checkpoint(models["olmoe"]).fingerprint()
    same = shutil.copytree(models["olmoe"], tmp_path / "same")
    assert Checkpoint(same).fingerprint() == Checkpoint(models["olmoe"]).fingerprint()


def test_the_example_is_a_checkpoint():
    assert Checkpoint(EXAMPLE).architecture.sizes(Checkpoint(EXAMPLE).config) == {
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "intermediate_size": 256,
    }
