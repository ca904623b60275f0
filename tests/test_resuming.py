import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FAST, build, files, mostly_long
from test_commands import start

from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.progress import Progress

LAYERS = 10
DEEP = {"num_hidden_layers": LAYERS, "mlp_only_layers": [1, 4]}
OPTIONS = [*FAST, "--quiet"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of ten layers, two of them dense."""
    folder = tmp_path_factory.mktemp("deep")
    return build("qwen2_moe", folder / "model", **DEEP)


@pytest.fixture(scope="module")
def whole(deep):
    process = start("prism-refactor", deep, deep.parent / "whole", *OPTIONS)
    assert process.wait() == 0, process.stderr.read()
    return files(deep.parent / "whole")


def stop_after(monkeypatch, layer, error):
    finish = Progress.finish_layer

    def stopping(self, *arguments):
        if self.layers == layer:
            raise error
        finish(self, *arguments)

    monkeypatch.setattr(Progress, "finish_layer", stopping)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("layer", mostly_long([0, 1, 2, 4, 5, 9], 0, 4))
def test_a_run_stopped_in_any_layer_goes_on_with_the_same_bytes(tmp_path, deep, whole, command, monkeypatch, layer, statistics):
    out, source = tmp_path / "out", OPTIONS
    if statistics:
        assert command("prism-profile", deep, tmp_path / "stats", *FAST[:6], "--quiet").code == 0
        source = ["--stats", tmp_path / "stats", *FAST[6:], "--quiet"]
    with monkeypatch.context() as patch:
        stop_after(patch, layer, KeyboardInterrupt)
        result = command("prism-refactor", deep, out, *source)
    assert result.code == 130
    left = f"stopped with {layer} of {LAYERS} layers done; --resume goes on after them\n" if layer else "interrupted; nothing was written\n"
    assert result.err.lstrip() == left
    assert not out.exists()
    if layer:
        # A killed run may leave files that were about to get their names, ours and those of safetensors.
        (tmp_path / "out.partial" / ".config.json.1.partial").touch()
        (tmp_path / "out.partial" / ".state" / ".tmpAbCdEf").touch()
    resumed = command("prism-refactor", deep, out, *source, "--resume", "--log-json")
    assert resumed.code == 0, resumed.err
    assert files(out) == whole
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_random_goes_on_with_the_same_bytes(tmp_path, deep, whole, seed):
    """What was finished before a kill is never done again, whatever it falls into."""
    command = [sys.executable, Path(__file__).with_name("kill_at_random.py"), str(seed), deep, tmp_path / "out", *FAST]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    finished = json.loads(process.stdout.splitlines()[-1])
    assert finished == sorted(finished)
    assert len(finished) >= 3
    assert max(finished) > 0
    assert files(tmp_path / "out") == whole


def test_another_run_is_not_resumed_and_says_what_changed(tmp_path, deep, command, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt)
        assert command("prism-refactor", deep, out, *OPTIONS).code == 130
    partial = files(tmp_path)
    for options, message in (
        ([], "out.partial: holds an interrupted run; add --resume to go on or remove it"),
        (["--resume", "--router", "proxy"], "belongs to a run with recipe.router linear, not proxy; use the same or remove it"),
        (["--resume", "--seed", "1"], "belongs to a run with calibration.seed 0, not 1"),
    ):
        result = command("prism-refactor", deep, out, *OPTIONS, *options)
        assert (result.code, message in result.err, result.err.count("\n")) == (2, True, 1), result.err
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "fingerprint", lambda self: "another")
        assert "belongs to a run with source" in command("prism-refactor", deep, out, *OPTIONS, "--resume").err
    assert files(tmp_path) == partial


def test_an_error_in_a_later_layer_keeps_the_finished_ones(tmp_path, deep, whole, command, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 3, OSError(28, "No space left on device"))
        result = command("prism-refactor", deep, out, *OPTIONS)
    assert result.code == 5
    assert result.err.splitlines()[0] == f"stopped with 3 of {LAYERS} layers done; --resume goes on after them"
    assert result.err.splitlines()[1:] == ["error: the disk is full; free some space or choose a folder on another disk"]
    assert command("prism-refactor", deep, out, *OPTIONS, "--resume").code == 0
    assert files(out) == whole


def test_a_finished_run_that_is_stopped_while_it_gets_its_name_is_kept(tmp_path, deep, whole, command, monkeypatch):
    out = tmp_path / "out"
    rename = Path.rename

    def stopping(self, target):
        if Path(target) == out:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopping)
        assert command("prism-refactor", deep, out, *OPTIONS).code == 130
    assert not out.exists()
    assert command("prism-refactor", deep, out, *OPTIONS, "--resume").code == 0
    assert files(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
