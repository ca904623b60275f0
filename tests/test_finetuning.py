import json
import shutil
import signal

import pytest
import torch
from conftest import EXAMPLE, files, load, logits, mostly_long
from safetensors.torch import load_file, save_file

from prism_refactor.calibration.settings import Calibration
from prism_refactor.distillation import Distillation
from prism_refactor.files import output_folder
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.modeling_prism import ROUTER_FILE, attach, moe_blocks, set_active
from prism_refactor.refactoring.finetune import Training

QUICK = ["--steps", "4", "--num-samples", "12", "--max-seq-length", "32", "--batch-size", "2", "--evaluate-every", "2", "--quiet"]


def changed_tensors(before, after):
    found = set()
    for path in before.glob("*.safetensors"):
        old, new = load_file(path), load_file(after / path.name)
        assert old.keys() == new.keys()
        found |= {name for name in old if not torch.equal(old[name], new[name])}
    return found


@pytest.mark.parametrize("router", mostly_long(["two-level", "stock"], "two-level"))
def test_only_what_is_trained_moves_and_held_out_perplexity_falls(tmp_path, elastic, command, router):
    out = tmp_path / "out"
    result = command("prism-finetune", elastic, out, *QUICK, "--router", router)
    assert result.code == 0, result.err
    record = json.loads((out / "prism.json").read_text())["finetuning"]
    assert (record["router"], record["least_k"], record["most_k"]) == (router, 2, 12 if router == "two-level" else 16)
    assert record["best_step"] > 0
    own = {"weight"} if router == "stock" else {"compensation", "map_in", "map_out", "scale", "threshold"}
    found = changed_tensors(elastic, out)
    assert {name.rpartition("gate.")[2] for name in found} == own
    assert set(files(out)) == set(files(elastic))
    card = (out / "README.md").read_text()
    assert f"{'what stands in for dropped sub-experts was' if router == 'two-level' else 'rows of the stock router were'} trained" in card
    assert "No weight was trained" not in card
    model = load(out)
    assert torch.isfinite(logits(model, torch.arange(2, 30)[None])).all()
    if router == "two-level":
        assert command("prism-verify", EXAMPLE, out, "--num-samples", "1", "--max-seq-length", "64").code == 0
    assert list(tmp_path.iterdir()) == [out]


def trained(elastic, settings, rows):
    return Training(attach(load(elastic), elastic), rows, rows, settings)


def test_stand_ins_are_trained_and_nothing_else(elastic):
    rows = torch.arange(2, 66)[None].repeat(3, 1)
    training = trained(elastic, Distillation(2, 4, 4, 1e-2, 3, 1, 0), rows)
    assert {name.partition(".")[2] for name in training.parameters} == {"compensation", "map_in", "map_out", "scale"}
    training._train_on(rows, 4)
    for name, parameter in training.parameters.items():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0, name
        # The first of two steps: a fifth of the rate.
        moved = (parameter - training.original[name]).abs().max()
        assert 0 < moved <= 2e-3 * training.original[name].square().mean().sqrt() * 1.01
    assert all(parameter.grad is None for name, parameter in training.model.named_parameters() if "two_level" not in name)


def test_it_learns_what_the_model_gives_at_full_k(elastic):
    rows = torch.randint(2, 500, (4, 48), generator=torch.Generator().manual_seed(0))
    training = trained(elastic, Distillation(12, 2, 2, 1e-2, 4, 20, 0), rows)

    def divergence():
        exact = training._teacher(rows)
        set_active(training.model, 2)
        return torch.nn.functional.kl_div(logits(training.model, rows).log_softmax(-1), exact, log_target=True, reduction="sum")

    before = divergence()
    for _ in range(12):
        training._train_on(rows, 2)
    assert divergence() < 0.9 * before


@torch.inference_mode()
def test_thresholds_are_those_of_what_the_trained_model_computes(elastic):
    rows = Calibration(num_samples=12, max_seq_length=64).rows(Checkpoint(elastic))
    training = trained(elastic, Distillation(1, 2, 12, 1e-2, 4, 1, 0), rows)
    training.best_values = {name: 3 * value for name, value in training.original.items()}
    found, routers = training.thresholds(), [block.experts.two_level for block in moe_blocks(training.model)]
    for name, parameter in training.parameters.items():
        parameter.data = training.best_values[name]

    def ran():
        set_active(training.model, budget=0.25)
        training.model.prism_active.ran = 0
        logits(training.model, rows)
        return training.model.prism_active.ran.double().mean().item() / len(routers)

    before = ran()
    for router, own in zip(routers, found, strict=True):
        assert (own.diff() <= 0).all()
        router.threshold = own
    assert abs(ran() - 4) < 0.15
    assert abs(before - 4) > 2 * abs(ran() - 4)


def test_k_is_drawn_between_the_least_and_the_most_and_the_rate_falls_to_nothing():
    settings = Distillation(1000, 2, 12, 0.01, 8, 20, 0)
    drawn = torch.tensor([settings.k_at(step) for step in range(1000)])
    assert (drawn.min(), drawn.max()) == (2, 12)
    # Of the logarithm's range, half is below its middle, the root of 2 x 12.
    assert (drawn < 4.9).float().mean() == pytest.approx(0.5, abs=0.05)
    assert [settings.k_at(step) for step in range(5)] == drawn[:5].tolist()
    rates = [settings.rate_at(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.002)
    assert max(rates) == pytest.approx(0.01, rel=1e-4)
    assert rates[-1] < 1e-7


class Interrupting(dict):
    """Parameters; an interrupt comes while they are given their own values back, after the first."""

    passes = 0

    def items(self):
        self.passes += 1
        for number, item in enumerate(super().items()):
            if (self.passes, number) == (3, 1):
                signal.raise_signal(signal.SIGINT)
            yield item


def test_an_interrupt_while_the_teacher_speaks_leaves_the_parameters_as_they_were(elastic):
    rows = torch.arange(2, 66)[None]
    training = trained(elastic, Distillation(1, 4, 4, 1e-3, 1, 1, 0), rows)
    for parameter in training.parameters.values():
        parameter.data = parameter.data + 1
    own = {name: parameter.data for name, parameter in training.parameters.items()}
    training.parameters = Interrupting(training.parameters)
    with pytest.raises(KeyboardInterrupt):
        training._teacher(rows)
    assert training.parameters.passes == 3
    assert all(torch.equal(parameter.data, own[name]) for name, parameter in training.parameters.items())


@pytest.mark.parametrize(("where", "step"), mostly_long([("_train_on", 3), ("perplexity", 4)], ("perplexity", 4)))
def test_a_resumed_run_gives_the_same_bytes(tmp_path, elastic, command, monkeypatch, where, step):
    assert command("prism-finetune", elastic, tmp_path / "whole", *QUICK).code == 0
    whole = getattr(Training, where)

    def interrupted(self, *arguments):
        if self.step == step:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(Training, where, interrupted)
    result = command("prism-finetune", elastic, tmp_path / "out", *QUICK)
    assert result.code == 130
    assert result.err == f"stopped after step {step} of 4; --resume goes on\n"
    assert (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Training, where, whole)
    again = command("prism-finetune", elastic, tmp_path / "out", *QUICK)
    assert (again.code, "holds an interrupted run; add --resume" in again.err) == (2, True)
    other = command("prism-finetune", elastic, tmp_path / "out", *QUICK, "--resume", "--least-k", "3")
    assert (other.code, "belongs to a run with distillation.least_k 2, not 3" in other.err) == (2, True)
    assert command("prism-finetune", elastic, tmp_path / "out", *QUICK, "--resume").code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--most-k", "16"], 2, "need 1 <= least <= most <= 15 for the two-level router"),
        (["--least-k", "9", "--most-k", "4"], 2, "--least-k 9, --most-k 4"),
        (["--router", "stock", "--most-k", "17"], 2, "need 1 <= least <= most <= 16 for the stock router"),
    ],
)
def test_finetune_refusals(tmp_path, elastic, command, options, code, message):
    result = command("prism-finetune", elastic, tmp_path / "out", *QUICK, *options)
    assert result.code == code
    assert message in result.err
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("gone", "code"), [(("map_in", "map_out", "threshold"), 0), (("map_in", "map_out", "compensation", "scale"), 3)])
def test_routers_that_earlier_versions_wrote(tmp_path, elastic, command, gone, code):
    old = shutil.copytree(elastic, tmp_path / "old")
    tensors = load_file(old / ROUTER_FILE)
    save_file({name: value for name, value in tensors.items() if not name.endswith(gone)}, old / ROUTER_FILE)
    result = command("prism-finetune", old, tmp_path / "out", *QUICK)
    assert result.code == code, result.err
    assert ("refactor again" in result.err) == (code == 3)
    assert (tmp_path / "out").exists() == (code == 0)


@pytest.mark.parametrize("options", [["--most-k", "1"], ["--least-k", "14"]])
def test_one_bound_of_k_is_enough(tmp_path, elastic, command, options):
    result = command("prism-finetune", elastic, tmp_path / "out", *QUICK, *options)
    assert result.code == 0, result.err


def test_resume_without_an_unfinished_run_starts_one(tmp_path, elastic, command):
    result = command("prism-finetune", elastic, tmp_path / "out", *QUICK, "--resume")
    assert result.code == 0, result.err
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_run_does_not_go_on_with_another_router_or_beside_another_run(tmp_path, elastic, command, monkeypatch):
    """A trained and an untrained folder have equal weights; only their router files differ."""

    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_train_on", interrupted)
        assert command("prism-finetune", elastic, tmp_path / "out", *QUICK).code == 130
    tuned = shutil.copytree(elastic, tmp_path / "tuned")
    tensors = load_file(tuned / ROUTER_FILE)
    name = next(name for name in tensors if name.endswith("gate.bias"))
    save_file(tensors | {name: tensors[name] + 1}, tuned / ROUTER_FILE)
    result = command("prism-finetune", tuned, tmp_path / "out", *QUICK, "--resume")
    assert result.code == 2
    assert "belongs to a run with source " in result.err
    with output_folder(tmp_path / "busy"):
        result = command("prism-finetune", elastic, tmp_path / "busy", *QUICK)
    assert (result.code, "another run is writing to it" in result.err) == (3, True)
