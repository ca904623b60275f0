import json
import shutil
import signal
from itertools import product

import pytest
import torch
from conftest import EXAMPLE, files, load, logits, mostly_long
from safetensors.torch import load_file, save_file

from prism_refactor.curriculum import Curriculum
from prism_refactor.files import output_folder
from prism_refactor.models.modeling_prism import ROUTER_FILE, attach
from prism_refactor.refactoring.finetune import Training

QUICK = ["--steps", "4", "--num-samples", "12", "--max-seq-length", "32", "--batch-size", "2", "--evaluate-every", "2", "--quiet"]


def changed_tensors(before, after):
    found = set()
    for path in before.glob("*.safetensors"):
        old, new = load_file(path), load_file(after / path.name)
        assert old.keys() == new.keys()
        found |= {name for name in old if not torch.equal(old[name], new[name])}
    return found


@pytest.mark.parametrize(
    ("router", "loss"), mostly_long([*product(["two-level", "stock"], ["cross-entropy", "distill"])], ("two-level", "cross-entropy"))
)
def test_only_router_rows_move_and_held_out_perplexity_falls(tmp_path, elastic, command, router, loss):
    out = tmp_path / "out"
    options = ["--router", router, "--loss", loss, "--learning-rate", "1e-3" if router == "two-level" else "1e-4"]
    result = command("prism-finetune", elastic, out, *QUICK, *options)
    assert result.code == 0, result.err
    record = json.loads((out / "prism.json").read_text())["finetuning"]
    assert (record["router"], record["loss"], record["first_k"], record["last_k"]) == (router, loss, 4, 12)
    leaves = ("gate.weight",) if router == "stock" else ("gate.weight", "gate.bias", "gate.threshold")
    found = changed_tensors(elastic, out)
    assert all(name.endswith(leaves) for name in found)
    assert bool(found) == (record["best_step"] > 0)
    assert set(files(out)) == set(files(elastic))
    card = (out / "README.md").read_text()
    assert f"rows of the {'sub-expert' if router == 'two-level' else 'stock'} router were trained" in card
    assert "No weight was trained" not in card
    model = load(out)
    assert torch.isfinite(logits(model, torch.arange(2, 30)[None])).all()
    if router == "two-level":
        assert command("prism-verify", EXAMPLE, out, "--num-samples", "1", "--max-seq-length", "64").code == 0
    assert list(tmp_path.iterdir()) == [out]


def test_straight_through_reaches_the_rows_of_chosen_and_dropped(elastic):
    model = attach(load(elastic), elastic)
    rows = torch.arange(2, 66)[None].repeat(3, 1)
    training = Training(model, rows, rows, Curriculum(1, 4, 4, 1e-3, "cross-entropy", 3, 1, 0))
    training._train_on(rows, 4)
    for name, parameter in training.parameters.items():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "two_level" not in name)


def test_k_rises_linearly():
    curriculum = Curriculum(5, 8, 24, 1e-5, "cross-entropy", 1, 1, 0)
    assert [curriculum.k_at(step) for step in range(5)] == [8, 12, 16, 20, 24]


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
    model = attach(load(elastic), elastic)
    rows = torch.arange(2, 66)[None]
    training = Training(model, rows, rows, Curriculum(1, 4, 4, 1e-3, "distill", 1, 1, 0))
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
    options = [*QUICK, "--learning-rate", "1e-3"]
    assert command("prism-finetune", elastic, tmp_path / "whole", *options).code == 0
    whole = getattr(Training, where)

    def interrupted(self, *arguments):
        if self.step == step:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(Training, where, interrupted)
    result = command("prism-finetune", elastic, tmp_path / "out", *options)
    assert result.code == 130
    assert result.err == f"stopped after step {step} of 4; --resume goes on\n"
    assert (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Training, where, whole)
    again = command("prism-finetune", elastic, tmp_path / "out", *options)
    assert (again.code, "holds an interrupted run; add --resume" in again.err) == (2, True)
    other = command("prism-finetune", elastic, tmp_path / "out", *options, "--resume", "--loss", "distill")
    assert (other.code, "belongs to a run with curriculum.loss cross-entropy, not distill" in other.err) == (2, True)
    assert command("prism-finetune", elastic, tmp_path / "out", *options, "--resume").code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--last-k", "16"], 2, "need 1 <= first <= last <= 15 for the two-level router"),
        (["--first-k", "9", "--last-k", "4"], 2, "--first-k 9, --last-k 4"),
    ],
)
def test_finetune_refusals(tmp_path, elastic, command, options, code, message):
    result = command("prism-finetune", elastic, tmp_path / "out", *QUICK, *options)
    assert result.code == code
    assert message in result.err
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


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
