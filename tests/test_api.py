"""The public functions of `prism_refactor`, what importing it costs, and what its installation puts beside other packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import COMMANDS, EXAMPLE, load, logits
from transformers import AutoModelForCausalLM

import prism_refactor
from prism_refactor.errors import InputError, UsageError

ROOT = Path(__file__).parents[1]
SLOW_TO_IMPORT = {"torch", "transformers", "datasets", "numba", "scipy", "sklearn", "matplotlib", "deap", "fastapi", "aiohttp", "pydantic"}
QUICK = {"num_samples": 8, "max_seq_length": 64, "tokens_per_expert": 64}


def imported(script, *arguments):
    """The slow packages that a script has imported when it ends."""
    script += "\nimport sys; print(' '.join(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=True)
    return SLOW_TO_IMPORT & set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_nothing_else():
    assert not imported("import prism_refactor; prism_refactor.__version__")


RUN = """
import sys
from importlib import import_module
from prism_refactor.cli.app import run

main = import_module("prism_refactor.cli." + sys.argv[1]).main
code = run(main.command, sys.argv[3:])
assert code == int(sys.argv[2]), code
"""


@pytest.mark.parametrize("name", [module.__name__.rpartition(".")[2] for module in COMMANDS.values()])
def test_help_version_and_mistakes_import_nothing_slow(name, tmp_path):
    for code, *arguments in ((0, "--help"), (0, "--version"), (2, "--no-such-option")):
        assert not imported(RUN, name, code, *arguments), arguments
    if name not in ("loadtest", "replay"):
        # As many arguments as it takes: the first folder is not there.
        folders = [tmp_path / "absent"] * (1 if name in ("bench", "run", "serve") else 2)
        options = ["--prompt", "x"] if name == "run" else []
        assert not imported(RUN, name, 3, *folders, *options)


def test_every_public_name_is_documented_with_an_example():
    for name in prism_refactor.__all__:
        if name != "__version__":
            assert ">>> " in getattr(prism_refactor, name).__doc__, name
    assert prism_refactor.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        prism_refactor.nothing  # noqa: B018


def test_a_checkpoint_is_refactored_evaluated_and_run(tmp_path, models, token_ids):
    out = tmp_path / "out"
    manifest = prism_refactor.refactor(models["olmoe"], out, workers=1, solver="ascent", sub_experts=2, **QUICK)
    assert (manifest.recipe.sub_experts, manifest.recipe.solver) == (2, "ascent")
    text = tmp_path / "text.txt"
    text.write_text("The river runs through the old town and past the mill. " * 40)
    original, refactored = prism_refactor.evaluate(models["olmoe"], out, k=[2, 4], max_seq_length=64, datasets=(str(text),))
    assert [point.k for point in refactored.points] == [2, 4]
    assert refactored.points[-1].perplexity == pytest.approx(original.points[-1].perplexity, rel=1e-4)
    model = prism_refactor.load(out, k=3)
    assert model.prism_active.per_layer == [3, 3]
    prism_refactor.set_active(model, [4, 4])
    expected = logits(load(models["olmoe"]), token_ids)
    torch.testing.assert_close(logits(model.float(), token_ids), expected, atol=1e-3, rtol=0)
    attached = prism_refactor.attach(AutoModelForCausalLM.from_pretrained(out), out)
    assert attached.prism_active.per_layer == [4, 4]
    with pytest.raises(UsageError, match="exists; choose another output folder or add `overwrite`"):
        prism_refactor.refactor(models["olmoe"], out)


def test_a_profile_has_a_summary_for_each_layer(tmp_path, models):
    summaries = prism_refactor.profile(models["qwen2_moe"], tmp_path / "stats", **QUICK)
    assert [summary["layer"] for summary in summaries] == [0, 2]
    assert (tmp_path / "stats" / "index.json").exists()


def test_errors_name_options_as_python_does(tmp_path, models):
    with pytest.raises(UsageError, match=r"`sub_experts` 3: must be a power of two"):
        prism_refactor.refactor(models["olmoe"], tmp_path / "out", sub_experts=3)
    with pytest.raises(UsageError, match=r"unknown option `subexperts`; choose from batch_size, "):
        prism_refactor.refactor(models["olmoe"], tmp_path / "out", subexperts=4)
    with pytest.raises(InputError, match="not a refactored checkpoint"):
        prism_refactor.load(models["olmoe"])


@pytest.mark.long
def test_a_wheel_holds_one_name(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(pip, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"prism_refactor"}
    for wanted in ("solvers/kernels.py", "cli/refactor.py", "calibration/data/calibration.jsonl", "evaluation/report.html", "py.typed"):
        assert f"prism_refactor/{wanted}" in names


def test_the_folders_at_the_top_are_mounted_under_the_one_name():
    for name, folder in (("cli", "prism_cli"), ("calibration", "calibration"), ("solvers", "solvers")):
        assert (ROOT / "prism_refactor" / name).resolve() == (ROOT / folder).resolve()
    assert EXAMPLE.exists()
