import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLE, FAST, load
from lm_tasks import CHOICE, write_task
from PIL import Image
from transformers import AutoTokenizer

from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.text import load_tokenizer
from prism_refactor.errors import UsageError
from prism_refactor.evaluation.cost import CostModel
from prism_refactor.evaluation.curve import FIGURES
from prism_refactor.evaluation.losses import Point, stream_losses
from prism_refactor.evaluation.windows import read_windows
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.modeling_prism import attach, moe_gates, set_active
from prism_refactor.models.stream import ComputeOptions
from prism_refactor.requirements import Requirement

TEXT = ["--num-tokens", "3000", "--max-seq-length", "128"]


@pytest.fixture(scope="module")
def windows():
    return read_windows(Calibration(max_seq_length=128), Checkpoint(EXAMPLE), most=3000)


@torch.inference_mode()
def plain_sums(model, windows):
    """Summed loss of each window's scored tokens with transformers' own loss and labels of -100 elsewhere."""
    sums = []
    for row, scored in zip(windows.rows, windows.scored, strict=True):
        labels = torch.where(scored, row, -100)
        sums.append(model(input_ids=row[None], labels=labels[None]).loss.item() * int(scored.sum()))
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.long
def test_streamed_losses_are_transformers_losses(elastic, windows):
    original = load(EXAMPLE)
    expected = []
    for k in (1, 4):
        for gate in moe_gates(original):
            gate.top_k = k
        expected.append(plain_sums(original, windows))
    points = [Point("original", k) for k in (1, 4)]
    found = stream_losses(Checkpoint(EXAMPLE), windows, points, ComputeOptions(torch.float32, batch_size=5)).sums
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-2, rtol=1e-4)
    stock, two_level = load(elastic), attach(load(elastic), elastic)
    expected, points = [], []
    # The order mixes the routers: attaching one must not leak into the other.
    for router, model, k in (("two-level", two_level, 7), ("stock", stock, 6), ("two-level", two_level, 16)):
        set_active(model, k)
        expected.append(plain_sums(model, windows))
        points.append(Point(router, k))
    found = stream_losses(Checkpoint(elastic), windows, points, ComputeOptions(torch.float32, batch_size=5)).sums
    # Repeated stock rows nearly tie, so rounding may route a token otherwise.
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-2, rtol=1e-3)


def test_hidden_states_that_do_not_fit_are_kept_in_a_file(elastic, windows, monkeypatch):
    points = [Point("two-level", k) for k in (4, 16)]
    expected = stream_losses(Checkpoint(elastic), windows, points, ComputeOptions(torch.float32, batch_size=5)).sums
    monkeypatch.setattr("prism_refactor.models.stream.MEMORY_LIMIT", 1000)
    assert torch.equal(stream_losses(Checkpoint(elastic), windows, points, ComputeOptions(torch.float32, batch_size=5)).sums, expected)


@pytest.mark.parametrize("stride", [1, 5, 8])
def test_every_token_but_the_first_of_a_domain_is_scored_once(tmp_path, stride):
    tokenizer = load_tokenizer(EXAMPLE)
    texts = {"a": "one two three four five six seven eight nine ten eleven twelve", "b": "short"}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"domain": name, "text": text}) + "\n" for name, text in texts.items()))
    found = read_windows(Calibration((str(tmp_path / "t.jsonl"),), max_seq_length=8), Checkpoint(EXAMPLE), stride)
    for name, text in texts.items():
        ids = tokenizer(text)["input_ids"]
        scored = [
            token
            for row, counted, domain in zip(found.rows, found.scored, found.domains, strict=True)
            if domain == name
            for token in row[counted].tolist()
        ]
        assert scored == ids[1:]
    assert not found.scored[:, 0].any()


def test_costs_count_the_parameters_of_the_model(elastic):
    checkpoint, model = Checkpoint(elastic), load(elastic)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cost = CostModel(checkpoint, "stock", 128)
    one = 3 * 256 * 64
    assert cost.at([16] * 4).active_parameters == parameters - 4 * 48 * one
    assert cost.at([16] * 4).flops - cost.at([15, 16, 16, 16]).flops == 2 * one
    two_level = CostModel(checkpoint, "two-level", 128)
    # The original gate for the stock one.
    assert two_level.at([16] * 4).flops - cost.at([16] * 4).flops == 4 * 2 * (16 - 64) * 256
    # And one row a sub-expert, two vectors for each of the 8 dropped, and a map of rank 48, in and out.
    assert two_level.at([8] * 4).flops - cost.at([8] * 4).flops == 4 * 2 * (16 - 64 + 64 + 16 + 2 * 48) * 256
    # At full k it is the original.
    assert two_level.at([16] * 4) == CostModel(Checkpoint(EXAMPLE), "original", 128).at([4] * 4)


def test_text_ends_at_its_limit_whatever_follows(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"domain": name, "text": "one two three four five six seven eight"}) + "\n")
    datasets = tuple(str(tmp_path / f"{name}.jsonl") for name in ("a", "b"))
    found = read_windows(Calibration(datasets, max_seq_length=8), Checkpoint(EXAMPLE), most=5)
    assert (found.domains, found.tokens) == (["a"], 4)


@pytest.mark.long
def test_eval_compares_at_the_same_cost_and_stores_what_it_found(tmp_path, elastic, command):
    out = shutil.copytree(elastic, tmp_path / "out")
    options = ["--router", "both", "--budget", "25%,50%", "--save", "--json", "--plot", tmp_path / "c.png"]
    result = command("prism-eval", EXAMPLE, out, *TEXT, *options)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert json.loads((out / "evaluation.json").read_text()) == report
    assert Image.open(tmp_path / "c.png").size[0] > 500
    original = {point["k"]: point for point in report["original"]["points"]}
    curves = {curve["router"]: curve for curve in report["refactored"]}
    for curve in curves.values():
        for point in curve["points"]:
            theirs = original[point["k"] // 4]
            assert point["share"] == theirs["share"] == point["k"] / 16
            assert point["ratio"] == pytest.approx(point["perplexity"] / theirs["perplexity"])
            assert point["interval"][0] < point["perplexity"] < point["interval"][1]
            assert set(point["domains"]) == set(theirs["domains"])
    half, whole = curves["two-level"]["points"][1], original[4]["perplexity"]
    recovered = (original[2]["perplexity"] - half["perplexity"]) / (original[2]["perplexity"] - whole)
    assert half["recovered"] == pytest.approx(recovered)
    assert half["recovered_interval"][0] < recovered < half["recovered_interval"][1]
    assert curves["two-level"]["points"][3]["perplexity"] == pytest.approx(whole, rel=1e-5)
    assert [point["budget"] for point in curves["two-level"]["budgets"]] == [0.25, 0.5]
    assert curves["stock"]["budgets"] == []
    for point in curves["two-level"]["budgets"]:
        assert len(point["by_layer"]) == 4
        assert sum(point["by_layer"]) / 4 / 16 == pytest.approx(point["share"])
        assert len(point["by_token"]) == len(report["text"]["sample"]) == 48
        assert 1 <= min(point["by_token"]) < max(point["by_token"]) <= 16
    windows = read_windows(Calibration(max_seq_length=128), Checkpoint(EXAMPLE), most=3000)
    assert load_tokenizer(EXAMPLE).decode(windows.rows[windows.sample_row, :48]) == "".join(report["text"]["sample"])
    assert command("prism-verify", EXAMPLE, out, "--num-samples", "1", "--max-seq-length", "64").code == 0


@pytest.mark.long
def test_quality_on_text_that_calibration_never_saw(elastic, command):
    """The promise: at a quarter, half and three quarters of the experts most of what the original loses is kept."""
    options = ["--num-tokens", "20000", "--json", "--k", "4,8,12,16"]
    result = command("prism-eval", EXAMPLE, elastic, *options, "--require", "recovered@25%>=0.6", "--require", "recovered@50%>=0.7")
    assert result.code == 0, result.err
    for point in json.loads(result.out)["refactored"][0]["points"]:
        assert point["ratio_interval"][0] <= 1


def test_eval_prints_tables_and_only_the_original_alone(elastic, command):
    result = command("prism-eval", EXAMPLE, elastic, *TEXT, "--k", "6,8-9", "--quiet")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].endswith(" tokens in windows of 128, stride 64")
    assert [line.split()[0] for line in lines if " of 16" in line] == ["6", "8", "9"]
    alone = command("prism-eval", EXAMPLE, *TEXT)
    assert alone.code == 0
    assert "sub-experts" not in alone.out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--require", "recovered@50%<=0.1"], 4, "out (two-level): recovered@50%<=0.1 does not hold, it is "),
        (["--require", "recovered@8>=0.1"], 0, ""),
        (["--fail-if", "recovered@8<0.1"], 2, "--fail-if is now --require, with a condition that must hold; turn the comparison round"),
        (["--require", "quality@8<0.1"], 2, "--require 'quality@8<0.1': write FIGURE<NUMBER"),
        (["--require", "recovered@7>=0.1"], 2, "not among the evaluated k (4, 8, 12, 16); add it with --k"),
        (["--require", "recovered@16>=0.1"], 2, "there is no 'recovered' at k = 16"),
        (["--k", "0-3"], 2, "--k 0-3: choose from 1 to 16"),
        (["--k", "many"], 2, "--k many: write numbers and ranges"),
        (["--stride", "200"], 2, "--stride 200: must be at most the window of 128 tokens"),
        (["--plot", "nowhere/c.png"], 2, "--plot nowhere/c.png: the folder does not exist"),
        (["--dataset", "missing.jsonl"], 3, "no such file"),
    ],
)
def test_eval_gates_and_refusals(elastic, command, options, code, message):
    result = command("prism-eval", EXAMPLE, elastic, *TEXT, "--quiet", *options)
    assert result.code == code, result.err
    assert message in result.err
    assert result.err.count("\n") == (code != 0)


def test_a_gate_never_passes_on_what_is_not_a_number():
    assert not Requirement.parse("recovered@50%>=0.3", FIGURES).holds(math.nan)
    assert not Requirement.parse("perplexity@8 < 1e3", FIGURES).holds(1000.0)
    assert Requirement.parse("perplexity@8 < 1e3", FIGURES).holds(999.0)
    with pytest.raises(UsageError):
        Requirement.parse("recovered@50<<1", FIGURES)


def test_eval_refuses_what_was_not_refactored_from_the_model(tmp_path, elastic, models, command):
    result = command("prism-eval", models["olmoe"], elastic, *TEXT)
    assert (result.code, "was made from another checkpoint" in result.err) == (3, True)
    result = command("prism-eval", EXAMPLE, EXAMPLE, *TEXT)
    assert (result.code, "not a refactored checkpoint" in result.err) == (3, True)


@pytest.mark.long
@pytest.mark.parametrize("k", [16, 3])
def test_lm_eval_runs_the_checkpoint_unchanged_at_any_k(tmp_path, elastic, k):
    documents = [
        {"question": "The Python standard", "choices": [" library", " zebra"], "answer": 0},
        {"question": "import os\nimport", "choices": [" sys", " Debian"], "answer": 0},
    ]
    write_task(tmp_path, "prism_local", documents, CHOICE)
    model_args = f"pretrained={elastic},trust_remote_code=True,num_experts_per_tok={k},dtype=float32"
    arguments = ["--model", "hf", "--model_args", model_args, "--tasks", "prism_local", "--include_path", tmp_path, "--device", "cpu"]
    subprocess.run(
        [Path(sys.executable).parent / "lm_eval", *arguments, "--batch_size", "1", "--output_path", tmp_path / "result", "--log_samples"],
        check=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
    )
    (samples,) = (tmp_path / "result").rglob("samples_*.jsonl")
    model, tokenizer = attach(load(elastic), elastic), AutoTokenizer.from_pretrained(elastic)
    set_active(model, k)
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for choice, response in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            context = tokenizer(sample["doc"]["question"])["input_ids"]
            ids = torch.tensor([tokenizer(sample["doc"]["question"] + choice)["input_ids"]])
            with torch.inference_mode():
                scores = model(input_ids=ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
            expected = scores.gather(1, ids[0, len(context) :, None]).sum().item()
            assert float(response[0]) == pytest.approx(expected, abs=1e-3)


def test_a_model_with_the_papers_proxy_is_measured(tmp_path, models, command):
    """Its cost needs the number of gate neurons, which only the manifest knows."""
    out = tmp_path / "out"
    assert command("prism-refactor", models["olmoe"], out, *FAST, "--router", "proxy", "--gate-neurons", "2", "--quiet").code == 0
    options = ["--num-tokens", "300", "--max-seq-length", "64", "--json", "--quiet"]
    result = command("prism-eval", models["olmoe"], out, *options)
    assert result.code == 0, result.err
    (curve,) = json.loads(result.out)["refactored"]
    costs = [point["cost"]["flops"] for point in curve["points"]]
    # Per MoE layer: 2 gate neurons of gate and up rows for each of the 8 sub-experts, the products counted twice.
    one = 2 * 3 * 32 * 4
    assert costs[0] - (costs[1] - 4 * one * 2) == 2 * 2 * (2 * 2 * 8 * 32)


def test_a_sample_of_text_is_text(tmp_path):
    """Where some domain has nothing to score, and characters are several tokens."""
    texts = {"a": "na\u00efve \u65e5\u672c " * 3, "b": "x", "c": "so " * 3}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"domain": name, "text": text}) + "\n" for name, text in texts.items()))
    for domain in ("a", "b", "c"):
        windows = read_windows(Calibration((str(tmp_path / "t.jsonl"),), max_seq_length=16), Checkpoint(EXAMPLE))
        assert windows.scored[windows.sample_row].any(), domain
        row = windows.rows[windows.sample_row, : len(windows.sample)]
        assert "".join(windows.sample) == load_tokenizer(EXAMPLE).decode(row).rstrip("\ufffd")
        assert "\ufffd" not in "".join(windows.sample)
        # The next time another row is in the middle.
        texts["c"] += texts["a"]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps({"domain": name, "text": text}) + "\n" for name, text in texts.items()))
