import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import EXAMPLE, FAST

BIN = Path(sys.executable).parent
ROOT = EXAMPLE.parents[1]


def start(*arguments, **options):
    return subprocess.Popen(
        [BIN / arguments[0], *map(str, arguments[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


@pytest.mark.parametrize("phase", ["imports", "profiling"])
def test_interruption_of_imports_or_profiling_leaves_nothing_behind(tmp_path, phase):
    process = start("prism-profile", EXAMPLE, tmp_path / "out", "--batch-size", "1")
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (tmp_path / "out.partial").exists() if phase == "profiling" else "libtorch" in maps.read_text():
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; nothing was written"
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_nothing_behind(tmp_path, number, code):
    process = start("prism-refactor", EXAMPLE, tmp_path / "out", *FAST[:6], "--workers", "2")
    workers = []
    deadline = time.monotonic() + 120
    while not workers and time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(process.stderr.read())
        partial = (tmp_path / "out.partial").exists()
        workers = [child for child in psutil.Process(process.pid).children(recursive=True) if "loky" in " ".join(child.cmdline())]
        workers = workers if partial else []
        time.sleep(0.05)
    assert workers
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_progress_is_plain_lines_json_lines_or_nothing(tmp_path, command):
    plain = command("prism-refactor", EXAMPLE, tmp_path / "a", *FAST)
    assert "\r" not in plain.err
    assert plain.err.splitlines()[1].endswith("layer 0 (1/4): experts partitioned 16")
    assert "num_experts 16 -> 64" in plain.out
    logged = command("prism-refactor", EXAMPLE, tmp_path / "b", *FAST, "--log-json")
    events = [json.loads(line) for line in logged.err.splitlines()]
    warned = [event["layer"] for event in events if "warning" in event]
    assert warned == [3]
    events = [event for event in events if "warning" not in event]
    assert [event["event"] for event in events] == ["rows profiled", "experts partitioned"] * 4
    assert [event["layer"] for event in events[::2]] == [0, 1, 2, 3]
    quiet = command("prism-refactor", EXAMPLE, tmp_path / "c", *FAST, "--quiet")
    assert quiet.err.splitlines() == [line for line in plain.err.splitlines() if line.startswith("warning: ")]
    assert quiet.out.splitlines()[:5] == plain.out.splitlines()[:5]


def test_a_terminal_gets_a_bar_with_layer_expert_and_eta(tmp_path):
    script = f"stty rows 40 cols 120; {BIN}/prism-refactor {EXAMPLE} {tmp_path}/out {' '.join(FAST)}"
    shown = subprocess.run(["script", "-qec", script, "/dev/null"], capture_output=True, check=True, timeout=120).stdout.decode()
    assert "layer 1 (2/4) experts partitioned 16/16" in shown
    assert "<" in shown
    assert "\r" in shown


def test_errors_show_a_traceback_only_when_asked(tmp_path):
    result = subprocess.run([BIN / "prism-profile", tmp_path, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}/out: must be outside")
    (tmp_path / "model").mkdir()
    arguments = [BIN / "prism-profile", tmp_path / "model", tmp_path / "out"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (3, 1)
    result = subprocess.run([*arguments, "--debug"], capture_output=True, text=True, check=False)
    assert "Traceback" in result.stderr
    assert result.returncode == 3


def test_help_and_version(command):
    for name in ("prism-refactor", "prism-profile", "prism-verify"):
        assert "MODEL_DIR" in command(name, "--help").out
        assert "version" in command(name, "--version").out
        assert command(name).code == 2


def test_the_example_trainer_makes_such_a_checkpoint(tmp_path, command):
    corpus = ROOT / "calibration" / "data" / "evaluation.jsonl"
    options = ["--steps", "3", "--batch-tokens", "256", "--length", "64", "--vocabulary", "400", "--layers", "2"]
    subprocess.run(
        [sys.executable, ROOT / "examples" / "train_example_model.py", corpus, tmp_path / "model", *options], check=True, timeout=300
    )
    result = command("prism-refactor", tmp_path / "model", tmp_path / "out", *FAST)
    assert result.code == 0, result.err
