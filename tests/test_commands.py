import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import COMMANDS, EXAMPLE, FAMILIES, FAST, build, mostly_long

from prism_refactor.cli import app
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.refactoring import families

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


@pytest.mark.long
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


@pytest.mark.parametrize(("number", "code"), mostly_long([(signal.SIGINT, 130), (signal.SIGTERM, 143)], (signal.SIGINT, 130)))
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


@pytest.mark.long
def test_a_terminal_gets_a_bar_with_layer_expert_and_eta(tmp_path):
    script = f"stty rows 40 cols 120; {BIN}/prism-refactor {EXAMPLE} {tmp_path}/out {' '.join(FAST)}"
    shown = subprocess.run(["script", "-qec", script, "/dev/null"], capture_output=True, check=True, timeout=120).stdout.decode()
    assert "layer 1 (2/4) experts partitioned 16/16" in shown
    assert "<" in shown
    assert "\r" in shown


@pytest.mark.long
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


@pytest.mark.long
def test_the_example_trainer_makes_such_a_checkpoint(tmp_path, command):
    corpus = ROOT / "calibration" / "data" / "evaluation.jsonl"
    options = ["--steps", "3", "--batch-tokens", "256", "--length", "64", "--vocabulary", "400", "--layers", "2"]
    subprocess.run(
        [sys.executable, ROOT / "examples" / "train_example_model.py", corpus, tmp_path / "model", *options], check=True, timeout=300
    )
    result = command("prism-refactor", tmp_path / "model", tmp_path / "out", *FAST)
    assert result.code == 0, result.err


def test_every_family_is_listed_and_documented(command):
    known = json.loads(families.PROVEN.read_text())["families"]
    listed = command("prism-refactor", "--list-architectures")
    assert listed.code == 0
    assert all(family in listed.out for family in known)
    assert (ROOT / "docs" / "architectures.md").read_text() == f"{families.page()}\n"
    assert {values.get("model_type", family) for family, values in FAMILIES.items()} <= {
        family for family, found in known.items() if "reason" not in found
    }


@pytest.mark.long
def test_the_list_of_families_is_what_this_transformers_gives():
    """Of every config class: as `make docs` does it."""
    known, found = json.loads(families.PROVEN.read_text()), families.survey()
    assert found["transformers"] == known["transformers"]
    for results in (known["families"], found["families"]):
        for result in results.values():
            result.pop("stock", None)
            result.pop("two_level", None)
    assert found["families"] == known["families"]


def test_explain_says_how_a_checkpoint_can_be_split(models, command):
    result = command("prism-profile", "--explain", models["deepseek_v2"])
    assert result.code == 0
    facts = dict(line.strip().split("  ", 1) for line in result.out.splitlines()[1:])
    assert facts["layers with experts"] == "2 of 3"
    assert facts["n_shared_experts"] == "1"
    assert facts["--sub-experts"] == "2, 4"
    unnormalised = command("prism-profile", "--explain", models["dots1-unnormalised"]).out
    assert "unchanged: copies keep the weight" in unnormalised


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"num_local_experts": 2}),
        ("mixtral", {"num_local_experts": 3}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("olmoe", {"output_router_logits": True}),
        ("deepseek_v3-grouped", {"n_routed_experts": 16, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 4}),
        ("dots1", {"n_group": 2, "topk_group": 1}),
    ],
)
def test_unusual_configs_of_a_family_are_proven_too(tmp_path, command, family, changes):
    result = command("prism-profile", "--explain", build(family, tmp_path / "model", **changes))
    assert result.code == 0, result.err
    assert "a small random model of its kind" in result.out


def test_a_refactored_config_may_be_sorted(tmp_path, models, command):
    """As `save_pretrained` sorts it."""
    assert command("prism-refactor", models["olmoe"], tmp_path / "out", *FAST).code == 0
    before, path = Checkpoint(tmp_path / "out").architecture, tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert Checkpoint(tmp_path / "out").architecture == before
    assert before.keys == ("num_experts", "num_experts_per_tok", "intermediate_size")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "jetmoe"}, "'jetmoe' cannot be split: its experts (JetMoeParallelExperts) are not one fused module"),
        ({"model_type": "gpt_neox"}, "'gpt_neox' cannot be split: it has no experts"),
        ({"n_shared_experts": None}, "cannot be split: transformers cannot build a language model of it"),
        ({"moe_intermediate_size": 6}, "no number of sub-experts fits its expert width"),
    ],
)
def test_explain_says_why_it_cannot(tmp_path, models, command, changes, reason):
    folder = tmp_path / "model"
    if "moe_intermediate_size" in changes:
        build("dots1", folder, **changes)
    else:
        shutil.copytree(models["dots1"], folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    result = command("prism-profile", "--explain", folder)
    assert result.code in (2, 3)
    assert reason in result.err
    assert result.err.count("\n") == 1


def test_a_prompt_that_looks_like_a_flag_is_a_prompt():
    built = COMMANDS["prism-run"].main.command
    assert app.asks_for("--log-json", built, ["dir", "--log-json"])
    assert not app.asks_for("--log-json", built, ["dir", "--prompt", "--log-json"])
    assert app.asks_for("--log-json", built, ["dir", "--prompt", "--prompt", "--log-json"])
    assert not app.asks_for("--log-json", built, ["--", "--log-json"])


def test_errors_name_the_flags_of_their_command():
    built = COMMANDS["prism-refactor"].main.command
    message = "`datasets` x: cannot be read; use `num_samples`, or `not_an_option_here`"
    assert app.with_flags(message, built) == "--dataset x: cannot be read; use --num-samples, or --not-an-option-here"
