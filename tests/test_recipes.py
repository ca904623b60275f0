"""The recipes of examples/batch, run as they are: only the model, the text and the size of the run are others."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import build
from test_commands import BIN

pytestmark = pytest.mark.long

RECIPES = Path(__file__).parents[1] / "examples" / "batch"
TEXT = ["--num-samples", "8", "--max-seq-length", "64", "--tokens-per-expert", "64"]
SMALL = ["--solver", "ascent", "--workers", "1"]


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch") / "models"
    for family in ("olmoe", "qwen3_moe"):
        build(family, folder / family)
    return folder


def run(*command, cwd, code=0, **environment):
    path = f"{BIN}:{os.environ['PATH']}"
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False, env=os.environ | {"PATH": path} | environment
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def test_the_shell_batch_does_what_is_left_and_fails_on_a_requirement(tmp_path, models_folder):
    script = [RECIPES / "refactor-all.sh", models_folder, tmp_path / "out", *TEXT, *SMALL]
    run(*script, cwd=tmp_path, code=4, PRISM_REQUIRE="dropped<0.01")
    summary = json.loads((tmp_path / "out" / "olmoe.json").read_text())
    assert summary["required"][0]["requirement"] == "dropped<0.01"
    assert not summary["required"][0]["holds"]
    assert summary["seconds"].keys() >= {"statistics", "partitioning", "fitting", "writing"}
    events = [json.loads(line) for line in (tmp_path / "out" / "olmoe.log").read_text().splitlines()]
    assert events[-1]["exit_code"] == 4
    assert "dropped<0.01 does not hold" in events[-1]["error"]
    (tmp_path / "out" / "qwen3_moe" / "prism.json").unlink()
    (tmp_path / "out" / "qwen3_moe").rename(tmp_path / "elsewhere")
    first = (tmp_path / "out" / "olmoe" / "prism.json").stat().st_mtime_ns
    run(*script, cwd=tmp_path, code=4, PRISM_REQUIRE="dropped<1")
    assert (tmp_path / "out" / "qwen3_moe" / "prism.json").exists()
    # Done and found wanting: not done again, and not forgotten.
    assert (tmp_path / "out" / "olmoe" / "prism.json").stat().st_mtime_ns == first


def test_the_shell_batch_ends_when_it_is_interrupted(tmp_path, models_folder):
    path = f"{BIN}:{os.environ['PATH']}"
    script = [RECIPES / "refactor-all.sh", models_folder, tmp_path / "out", *TEXT, "--solver", "genetic", "--workers", "1"]
    process = subprocess.Popen([str(part) for part in script], env=os.environ | {"PATH": path}, start_new_session=True)
    while not (tmp_path / "out" / "olmoe.log").exists() or not (tmp_path / "out" / "olmoe.log").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() in (130, -signal.SIGINT)
    assert not (tmp_path / "out" / "qwen3_moe.json").exists()


def test_make_keeps_what_is_done(tmp_path, models_folder):
    make = [
        "make",
        "-f",
        RECIPES / "refactor.mk",
        f"MODELS={models_folder}",
        f"TEXT={' '.join(TEXT)}",
        f"OPTIONS={' '.join(SMALL)}",
        "REQUIRE=perplexity@50%>0",
    ]
    for _ in range(2):
        # A requirement that does not hold fails again.
        run(*make[:-1], "REQUIRE=perplexity@50%<0", cwd=tmp_path, code=2)
    run(*make, cwd=tmp_path)
    for name in ("olmoe", "qwen3_moe"):
        assert json.loads((tmp_path / "out" / name / "evaluation.json").read_text())["refactored"]
    assert "Nothing to be done" in run(*make, cwd=tmp_path).stdout


def test_a_job_array_profiles_and_the_next_job_refactors(tmp_path, models_folder):
    model, work = models_folder / "olmoe", tmp_path / "work"
    for task in range(1, 5):
        array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "4"}
        run(RECIPES / "slurm-profile.sh", model, work, *TEXT, "--batch-size", "2", cwd=tmp_path, **array)
    again = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "1", "SHARDS": "4"}
    shutil.rmtree(work / "stats-2")
    for _ in range(2):
        run(RECIPES / "slurm-profile.sh", model, work, *TEXT, "--batch-size", "2", cwd=tmp_path, **again)
    found = run(RECIPES / "slurm-refactor.sh", model, work, tmp_path / "out", "--solver", "ascent", cwd=tmp_path, SLURM_CPUS_PER_TASK="1")
    assert json.loads(found.stdout)["sizes"]["num_experts"] == {"source": 6, "result": 24}


def steps(name):
    """The shell commands of a CI job, but for the installation."""
    job = yaml.safe_load((RECIPES / name).read_text())
    if name.startswith("github"):
        return [step["run"] for step in job["jobs"]["refactor"]["steps"] if "run" in step and step["name"] != "install"]
    return job["refactor"]["script"]


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_ci_jobs(tmp_path, models_folder, name):
    commands = steps(name)
    assert len(commands) == 4
    for text in commands:
        # A small run, of a model that nobody trained.
        small = re.sub(r"--resume", f"--resume {' '.join(TEXT + SMALL)}", text).replace("error@50%<0.3", "error@50%<3")
        small = small.replace("--require 'recovered@50%>=0'", "--require 'perplexity@50%>=0' --max-seq-length 64")
        result = run(
            "bash",
            "-euo",
            "pipefail",
            "-c",
            small,
            cwd=tmp_path,
            MODEL_DIR=str(models_folder / "olmoe"),
            OUT_DIR="out",
            CI="true",
            NO_COLOR="1",
        )
        assert "\x1b" not in result.stdout + result.stderr
    assert all(item["holds"] for item in json.loads((tmp_path / "summary.json").read_text())["required"])
    assert json.loads((tmp_path / "evaluation.json").read_text())["refactored"]
