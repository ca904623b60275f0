import json

import pytest
import torch
from conftest import FAST, build, files
from safetensors.torch import load_file, save_file

from prism_refactor.calibration.profile import Profile
from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.store import Statistics
from prism_refactor.cli import app as door
from prism_refactor.cli import profile
from prism_refactor.cli.profile import merge
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.progress import Progress

TEXT = ["--num-samples", "12", "--max-seq-length", "40", "--tokens-per-expert", "24", "--batch-size", "2", "--quiet"]
SHARDS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build("qwen2_moe", tmp_path_factory.mktemp("source") / "model")


def run_merge(*arguments):
    return door.run(merge.command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    """The statistics of one run, and of the shards, in an order of their own."""
    root = tmp_path_factory.mktemp("stats")
    assert door.run(profile.main.command, [str(source), str(root / "whole"), *TEXT]) == 0
    for number in (2, 3, 1):
        assert door.run(profile.main.command, [str(source), str(root / f"part{number}"), *TEXT, "--shard", f"{number}/{SHARDS}"]) == 0
    return root


def test_merged_shards_are_what_one_run_finds(source, folders, tmp_path):
    assert run_merge(tmp_path / "merged", *(folders / f"part{number}" for number in (3, 1, 2))) == 0
    whole, merged = (json.loads((folder / "index.json").read_text()) for folder in (folders / "whole", tmp_path / "merged"))
    assert whole == merged
    for path in sorted((folders / "whole").glob("layer-*.safetensors")):
        expected, found = load_file(path), load_file(tmp_path / "merged" / path.name)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if name == "activation_sum":
                torch.testing.assert_close(found[name], value, rtol=1e-13, atol=0)
            else:
                assert torch.equal(found[name], value), name


def test_experts_without_tokens_in_some_or_all_shards(tmp_path, command):
    """Shards of one sample: experts that see no token in a few of them, and with a router that never picks one, in none."""
    folder = build("qwen2_moe", tmp_path / "model", num_experts=16)
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("mlp.gate.weight"):
            value[5:] *= 0.05
            value[4] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = ["--num-samples", "6", "--max-seq-length", "12", "--tokens-per-expert", "16", "--batch-size", "1", "--quiet"]
    assert command("prism-profile", folder, tmp_path / "whole", *text).code == 0
    parts = [tmp_path / f"part{number}" for number in range(1, 7)]
    for number, part in enumerate(parts, 1):
        assert command("prism-profile", folder, part, *text, "--shard", f"{number}/6").code == 0
    assert run_merge(tmp_path / "merged", *parts) == 0
    index = json.loads((tmp_path / "whole" / "index.json").read_text())
    assert index == json.loads((tmp_path / "merged" / "index.json").read_text())
    assert any(layer["unrouted"] for layer in index["layers"])
    seldom = [json.loads((part / "index.json").read_text())["layers"][0]["unrouted"] for part in parts]
    assert any(set(unrouted) - set(index["layers"][0]["unrouted"]) for unrouted in seldom)
    for path in sorted((tmp_path / "whole").glob("layer-*.safetensors")):
        expected, found = load_file(path), load_file(tmp_path / "merged" / path.name)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-13, atol=0)


def test_a_shard_alone_is_not_refactored_from(source, folders, tmp_path, command):
    result = command("prism-refactor", source, tmp_path / "out", "--stats", folders / "part2", *FAST[6:])
    assert result.code == 3
    assert "is shard 2/3; merge all of them first" in result.err


@pytest.mark.parametrize(("given", "message"), [((1, 3), "the shards given are 1/3, 3/3"), ((1, 2, 2, 3), "1/3, 2/3, 2/3, 3/3")])
def test_missing_and_repeated_shards_are_refused(folders, tmp_path, capsys, given, message):
    assert run_merge(tmp_path / "merged", *(folders / f"part{number}" for number in given)) == 3
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_shards_of_another_run_are_refused(source, folders, tmp_path, command, capsys):
    assert command("prism-profile", source, tmp_path / "other", *TEXT, "--seed", "7", "--shard", "2/3").code == 0
    assert run_merge(tmp_path / "merged", folders / "part1", tmp_path / "other", folders / "part3") == 3
    assert "was made with other calibration than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shard", "message"), [("0/3", "not I/M"), ("4/3", "not I/M"), ("x", "not I/M"), ("1/100", "6 batches of 2 samples")]
)
def test_shards_that_cannot_be_are_refused(source, tmp_path, command, shard, message):
    result = command("prism-profile", source, tmp_path / "out", *TEXT, "--shard", shard)
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupted_profile_goes_on_with_the_same_bytes(source, folders, tmp_path, command, monkeypatch, layer):
    finish = Progress.finish_layer

    def stopping(self, *arguments):
        if self.layers == layer:
            raise KeyboardInterrupt
        finish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "finish_layer", stopping)
        stopped = command("prism-profile", source, tmp_path / "stats", *TEXT)
    assert stopped.code == 130
    assert ("stopped with 1 of 2 layers done; --resume goes on after them" in stopped.err) == bool(layer)
    assert (tmp_path / "stats.partial").exists() == bool(layer)
    if layer:
        changed = command("prism-profile", source, tmp_path / "stats", *TEXT, "--seed", "3", "--resume")
        assert changed.code == 2
        assert "calibration.seed 0, not 3" in changed.err
    resumed = command("prism-profile", source, tmp_path / "stats", *TEXT, "--resume", "--html", tmp_path / "page.html")
    assert resumed.code == 0, resumed.err
    assert files(tmp_path / "stats") == files(folders / "whole")
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize("family", ["glm_moe_dsa", "qwen3_vl_moe"])
def test_an_interrupted_profile_of_unusual_layers_goes_on(models, tmp_path, command, monkeypatch, family):
    """Of layers that carry more than hidden states, the first of them dense; and of a model of images and text."""
    finish = Progress.finish_layer

    def stopping(self, *arguments):
        if self.layers == 1:
            raise KeyboardInterrupt
        finish(self, *arguments)

    options = ["--num-samples", "4", "--max-seq-length", "32", "--tokens-per-expert", "64"]
    assert command("prism-profile", models[family], tmp_path / "whole", *options).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "finish_layer", stopping)
        assert command("prism-profile", models[family], tmp_path / "stats", *options).code == 130
    resumed = command("prism-profile", models[family], tmp_path / "stats", *options, "--resume")
    assert resumed.code == 0, resumed.err
    assert files(tmp_path / "stats") == files(tmp_path / "whole")


def test_an_iterated_shard_has_its_part_of_the_text(source):
    checkpoint, calibration = Checkpoint(source), Calibration(num_samples=10, max_seq_length=16, batch_size=4)
    rows = calibration.rows(checkpoint)
    counts = [[int(layer.tokens_routed.sum()) for layer in Profile(checkpoint, calibration, rows, shard=(number, 2))] for number in (1, 2)]
    # Three batches of 4, 4 and 2 samples; two experts for each token.
    assert counts == [[4 * 16 * 2] * 2, [6 * 16 * 2] * 2]


def test_statistics_are_read_back(source, folders):
    whole = Statistics(folders / "whole")
    for layer in whole:
        assert [len(sample) for sample in layer.activations] == [len(tokens) for tokens in layer.sampled]
        assert all((tokens.diff() > 0).all() for tokens in layer.sampled)


def test_shards_of_another_text_are_refused(source, tmp_path, command, capsys):
    text = tmp_path / "text.txt"
    for number, words in ((1, "one and two "), (2, "two and one ")):
        text.write_text(words * 500)
        assert command("prism-profile", source, tmp_path / f"{number}", *TEXT, "--dataset", text, "--shard", f"{number}/2").code == 0
    assert run_merge(tmp_path / "merged", tmp_path / "1", tmp_path / "2") == 3
    assert "was made with other statistics than" in capsys.readouterr().err
