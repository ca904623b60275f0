"""Input that is broken, hostile or odd: refused before any work, in one line, with nothing written and nothing run."""

import errno
import json
import os
import random
import struct

import numpy as np
import pytest
import torch
from conftest import FAST, files
from safetensors.torch import load_file, save_file
from test_commands import start

from prism_refactor.files import LONGEST_NAME
from prism_refactor.progress import Progress
from prism_refactor.resources import available_memory

EXPERT, ROUTER = "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.gate.weight"


def copy(models, tmp_path, index=False):
    """The small olmoe model, with an index if asked."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files(models["olmoe"]).items():
        (folder / name).write_bytes(content)
    if index:
        file = "model-00001-of-00001.safetensors"
        (folder / "model.safetensors").rename(folder / file)
        write_index(folder, dict.fromkeys(load_file(folder / file), file))
    return folder


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit(folder, **changes):
    """Change config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace(folder, name, change):
    """Change a tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def header(folder, change):
    """Change the header of the only shard, a dict, as it stands in the file."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first_bytes(folder, data):
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(data)


def overlapping(content):
    names = [name for name in content if name != "__metadata__"]
    content[names[1]]["data_offsets"] = content[names[0]]["data_offsets"]
    return content


def beyond(content):
    content[ROUTER]["data_offsets"] = [2**40, 2**40 + 384]
    return content


def negative(content):
    content[ROUTER]["shape"] = [-6, -32]
    return content


def cut(folder, size):
    os.truncate(folder / "model.safetensors", size)


def pickled(folder):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def to_link(folder, target):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)


def to_pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def to_folder(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()


BROKEN = {
    "header cut": (lambda folder: cut(folder, 100), "truncated or not a safetensors file"),
    "body cut": (lambda folder: cut(folder, 20_000), "truncated or not a safetensors file"),
    "empty": (lambda folder: cut(folder, 0), "truncated or not a safetensors file"),
    "header of 2^60 bytes": (lambda folder: first_bytes(folder, struct.pack("<Q", 2**60)), "truncated or not a safetensors file"),
    "overlapping tensors": (lambda folder: header(folder, overlapping), "truncated or not a safetensors file"),
    "tensor beyond the file": (lambda folder: header(folder, beyond), "truncated or not a safetensors file"),
    "negative shape": (lambda folder: header(folder, negative), "truncated or not a safetensors file"),
    "pipe": (to_pipe, "is no regular file"),
    "broken link": (lambda folder: to_link(folder, "/nowhere"), "the file it links to is missing"),
    "pickle": (pickled, "save_pretrained('NEW_DIR')"),
    "fewer rows": (
        lambda folder: replace(folder, ROUTER, lambda value: value[:-1]),
        f"{ROUTER} has shape [5, 32], config.json says [6, 32]",
    ),
    "transposed": (lambda folder: replace(folder, EXPERT, torch.t), f"{EXPERT} has shape [32, 16], config.json says [16, 32]"),
    "norm": (lambda folder: replace(folder, "model.norm.weight", lambda value: value[:-1]), "model.norm.weight has shape [31]"),
    "int8 expert": (
        lambda folder: replace(folder, EXPERT, lambda value: value.to(torch.int8)),
        f"{EXPERT} is not stored as floating point",
    ),
    "int8 attention": (
        lambda folder: replace(folder, "model.layers.0.self_attn.q_proj.weight", lambda value: value.to(torch.int8)),
        "q_proj.weight is not stored as floating point",
    ),
    "half expert": (lambda folder: replace(folder, EXPERT, torch.Tensor.half), f"{EXPERT} is stored in float16 and"),
    "no experts": (lambda folder: edit(folder, num_experts=0), "0 experts, of which a token uses 2, make no router"),
    "experts without end": (lambda folder: edit(folder, num_experts=10**12), "no tensor has a row for each"),
    "layers without end": (lambda folder: edit(folder, num_hidden_layers=10**12), "the shards hold 2 layers"),
    "top 0": (lambda folder: edit(folder, num_experts_per_tok=0), "make no router"),
    "top 7 of 6": (lambda folder: edit(folder, num_experts_per_tok=7), "make no router"),
    "no positions": (lambda folder: edit(folder, max_position_embeddings=-1), "max_position_embeddings is -1"),
    "auto_map": (lambda folder: edit(folder, auto_map="x.M"), "auto_map"),
    "no auto_map": (lambda folder: edit(folder, auto_map=None), "auto_map is no JSON object"),
    "nested config": (lambda folder: (folder / "config.json").write_text("[" * 200_000), "cannot be read as JSON"),
    "config folder": (lambda folder: to_folder(folder, "config.json"), "cannot be read as JSON"),
    "side file that leads out": (
        lambda folder: (folder / "notes.txt").symlink_to("/etc/passwd"),
        "links to /etc/passwd, outside the model",
    ),
    "side file that leads nowhere": (lambda folder: (folder / "notes.txt").symlink_to("/nowhere"), "notes.txt: cannot be copied"),
    "side pipe": (lambda folder: os.mkfifo(folder / "pipe"), "pipe: cannot be copied"),
    "side device": (lambda folder: (folder / "zero").symlink_to("/dev/zero"), "zero: cannot be copied"),
    "linked folder": (lambda folder: (folder / "sub").symlink_to("/etc"), "its files would be left out"),
    "folder in the way": (lambda folder: to_folder(folder, "README.md"), "README.md: is a folder where the output has a file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_hostile_checkpoints_are_refused_before_any_work(tmp_path, models, command, name):
    damage, message = BROKEN[name]
    folder = copy(models, tmp_path)
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    for options in ([], ["--dry-run"]):
        result = command("prism-refactor", folder, tmp_path / "out", "--quiet", *FAST, *options)
        assert result.code == 3, result.err
        assert message in result.err
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert len(result.err) < 1000
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("file", ["../model/x.safetensors", "/etc/passwd", "", "..", "a" * 5000, 7, None, "missing.safetensors"])
def test_an_index_that_leads_out_or_nowhere_is_refused(tmp_path, models, command, file):
    folder = copy(models, tmp_path, index=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(folder, index | {EXPERT: file})
    result = command("prism-refactor", folder, tmp_path / "out", "--quiet", *FAST)
    assert result.code == 3
    assert result.err.count("\n") == 1
    assert len(result.err) < 500
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_of_a_header_is_refused_or_makes_no_difference(tmp_path, models, command, seed):
    """A flip may hit what nothing depends on (the metadata); then the result is the same."""
    folder = copy(models, tmp_path)
    assert command("prism-refactor", folder, tmp_path / "intact", "--quiet", *FAST).code == 0
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    chance = random.Random(seed)
    data[chance.randrange(8 + length)] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    result = command("prism-refactor", folder, tmp_path / "out", "--quiet", *FAST)
    assert result.code in (0, 3), result.err
    if result.code == 0:
        weights = [
            {name: value for name, value in files(tmp_path / out).items() if name.endswith(".safetensors")} for out in ("intact", "out")
        ]
        assert weights[0] == weights[1]
    else:
        assert result.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [EXPERT, EXPERT.replace("up", "down"), EXPERT.replace("up", "gate"), ROUTER, "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_nobody_trained_end_the_run_or_are_copied(tmp_path, models, command, name, value):
    folder = copy(models, tmp_path)
    replace(folder, name, lambda tensor: torch.full_like(tensor, value))
    result = command("prism-refactor", folder, tmp_path / "out", "--quiet", *FAST)
    if name == "model.norm.weight" or (name == ROUTER and value == 1e30):
        # Behind the last layer: nothing is computed with it, and it is the source's. A router of equal rows is a router.
        assert result.code == 0
        return
    assert result.code == 3, result.err
    assert "layer 1" in result.err
    assert "please report" not in result.err
    assert not (tmp_path / "out").exists()


def test_links_as_the_hub_cache_has_them_are_followed(tmp_path, models, command):
    source = copy(models, tmp_path)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "link").symlink_to(snapshot)
    for folder, out in ((snapshot, "out"), (tmp_path / "link", "out2")):
        assert command("prism-refactor", folder, tmp_path / out, "--quiet", *FAST).code == 0
    assert command("prism-refactor", models["olmoe"], tmp_path / "expected", "--quiet", *FAST).code == 0
    written = files(tmp_path / "out")
    assert written == files(tmp_path / "out2")
    weights = [name for name in written if name.endswith(".safetensors")]
    assert {name: written[name] for name in weights} == {name: files(tmp_path / "expected")[name] for name in weights}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_code_in_the_checkpoint_is_copied_and_never_run(tmp_path, models, command):
    folder, marker = copy(models, tmp_path), tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "json.py", "torch.py"):
        (folder / name).write_text(code)
    edit(folder, auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}, trust_remote_code=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization_evil.T", None]}}))
    out = tmp_path / "out"
    assert command("prism-refactor", folder, out, "--quiet", *FAST).code == 0
    assert command("prism-verify", folder, out, "--quiet").code == 0
    assert command("prism-profile", folder, tmp_path / "stats", "--quiet", *FAST[:6]).code == 0
    assert not marker.exists()
    assert (out / "modeling_evil.py").read_text() == code


def link(path, target):
    path.symlink_to(target)


IN_THE_WAY = {
    "loop": lambda tmp_path: link(tmp_path / "out", "out"),
    "partial that leads away": lambda tmp_path: link(tmp_path / "out.partial", tmp_path / "victim"),
    "partial that leads nowhere": lambda tmp_path: link(tmp_path / "out.partial", "nowhere"),
    "lock that leads away": lambda tmp_path: link(tmp_path / ".out.lock", tmp_path / "victim" / "file"),
    "lock folder": lambda tmp_path: (tmp_path / ".out.lock").mkdir(),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_is_in_the_way_of_the_output_is_left_alone(tmp_path, models, command, name):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("precious")
    (tmp_path / "victim" / ".incomplete").touch()
    IN_THE_WAY[name](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = command("prism-refactor", models["olmoe"], tmp_path / "out", "--quiet", *FAST)
    assert result.code == 2, result.err
    assert result.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "victim" / "file").read_text() == "precious"


def test_a_name_too_long_for_its_neighbours_is_refused(tmp_path, models, command):
    assert command("prism-refactor", models["olmoe"], tmp_path / ("x" * (LONGEST_NAME + 1)), "--quiet", *FAST).code == 2
    assert command("prism-refactor", models["olmoe"], tmp_path / ("x" * LONGEST_NAME), "--quiet", *FAST).code == 0


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path, models, command, monkeypatch):
    # Not by its mode: root may write anywhere.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK) and access(path, mode))
    for name, arguments in (("prism-refactor", FAST), ("prism-profile", FAST[:6])):
        result = command(name, models["olmoe"], tmp_path / "out", "--quiet", *arguments)
        assert result.code == 5, result.err
        assert "cannot be written to" in result.err
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kernel", ["flash_attention_2", "someone/kernels"])
def test_the_attention_kernel_of_the_source_is_not_asked_for(tmp_path, models, command, kernel):
    folder = copy(models, tmp_path)
    edit(folder, _attn_implementation=kernel, attn_implementation=kernel)
    assert command("prism-refactor", folder, tmp_path / "out", "--quiet", *FAST).code == 0


def test_tensors_that_transformers_does_not_know_pass_through(tmp_path, models, command):
    """Rotary tables inside a layer, as older releases stored them, a table of whole numbers, a layer for further tokens."""
    folder = copy(models, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
        "model.layers.1.counts": torch.arange(5),
        "model.layers.2.eh_proj.weight": torch.rand(3, 2),
    }
    save_file(tensors | extra, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    assert command("prism-refactor", folder, out, "--quiet", *FAST).code == 0
    written = {name: value for path in out.glob("model-*.safetensors") for name, value in load_file(path).items()}
    for name, value in extra.items():
        assert torch.equal(written[name], value)
    assert command("prism-verify", folder, out, "--quiet").code == 0


def test_memory_is_checked_before_any_work(tmp_path, models, command, monkeypatch):
    monkeypatch.setattr("prism_refactor.resources.allowed_memory", lambda: 2**20)
    result = command("prism-refactor", models["olmoe"], tmp_path / "out", "--quiet", *FAST)
    assert result.code == 5
    assert "of memory, 1.0 MiB is available; lower --num-samples" in result.err
    for name, arguments in (("prism-profile", FAST[:6]), ("prism-refactor", [*FAST, "--dry-run"])):
        assert command(name, models["olmoe"], tmp_path / "out", "--quiet", *arguments).code == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", [1, 2])
def test_the_memory_limit_of_an_enclosing_group_counts(tmp_path, monkeypatch, version):
    """As SLURM sets it: on the job, not on the task inside it."""
    root = tmp_path / "cgroup"
    group = root / "job" / "task"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for folder, limit in ((group, "max" if version == 2 else str(2**62)), (group.parent, str(2**20))):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(
            (*names, "memory.stat"), (limit, "4096", "active_file 0\ninactive_file 1024\ntotal_inactive_file 1024\n"), strict=True
        ):
            (folder / name).write_text(value)
    (tmp_path / "own").write_text("3:memory:/job/task\n" if version == 1 else "0::/job/task\n")
    found = available_memory(tmp_path / "own", {1: {"memory": root}, 2: {"": root}}[version])
    assert found == 2**20 - 4096 + 1024


RUNS_OUT = {
    "memory": (MemoryError(), "out of memory; lower --num-samples"),
    "mapping": (RuntimeError("unable to mmap 29 bytes from file <x>: Cannot allocate memory (12)"), "out of memory; lower --num-samples"),
    "disk": (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some space"),
}


@pytest.mark.parametrize("name", RUNS_OUT)
def test_running_out_in_the_middle_leaves_what_can_be_resumed(tmp_path, models, command, monkeypatch, name):
    error, message = RUNS_OUT[name]
    finish = Progress.finish_layer

    def fail(self, *arguments):
        if self.layers == 1:
            raise error
        finish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "finish_layer", fail)
        result = command("prism-refactor", models["olmoe"], tmp_path / "out", "--quiet", *FAST)
    assert result.code == 5
    assert "stopped with 1 of 2 layers done; --resume goes on after them" in result.err
    assert message in result.err
    assert command("prism-refactor", models["olmoe"], tmp_path / "out", "--quiet", *FAST, "--resume").code == 0
    assert command("prism-refactor", models["olmoe"], tmp_path / "whole", "--quiet", *FAST).code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def damaged_statistics(folder, change):
    path = folder / "layer-00001.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


STATISTICS = {
    "missing": (lambda folder: (folder / "layer-00001.safetensors").unlink(), "missing or truncated"),
    "cut": (lambda folder: os.truncate(folder / "layer-00001.safetensors", 5000), "missing or truncated"),
    "nan": (lambda folder: damaged_statistics(folder, lambda tensors: tensors["activations.0"].fill_(np.nan)), "not finite"),
    "incomplete": (lambda folder: damaged_statistics(folder, lambda tensors: tensors.pop("sampled.2")), "does not hold what prism-profile"),
    "options": (
        lambda folder: (folder / "index.json").write_text((folder / "index.json").read_text().replace('"num_samples"', '"nope"')),
        "no readable index.json",
    ),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_broken_statistics_are_refused(tmp_path, models, command, name):
    damage, message = STATISTICS[name]
    assert command("prism-profile", models["olmoe"], tmp_path / "stats", "--quiet", *FAST[:6]).code == 0
    damage(tmp_path / "stats")
    result = command("prism-refactor", models["olmoe"], tmp_path / "out", "--stats", tmp_path / "stats", "--quiet", *FAST[6:])
    assert result.code == 3
    assert message in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_text_that_is_at_hand_needs_no_cache(tmp_path, models):
    """As in a container without a home."""
    process = start(
        "prism-profile", models["olmoe"], tmp_path / "stats", *FAST[:6], "--quiet", env=os.environ | {"HF_HOME": "/proc/nowhere"}
    )
    assert process.wait() == 0, process.stderr.read()
