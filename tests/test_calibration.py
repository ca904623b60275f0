import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import EXAMPLE, FAMILIES, FAST, IN_PLACE, build, load, logits

from prism_refactor.calibration.profile import Profile
from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.sources import Source
from prism_refactor.calibration.statistics import OBSERVED, LayerCollector
from prism_refactor.calibration.store import Statistics
from prism_refactor.calibration.text import load_tokenizer, token_rows
from prism_refactor.errors import UsageError
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.modeling_prism import moe_block
from prism_refactor.models.stream import ComputeOptions, LayerStream

QUICK = Calibration(num_samples=6, max_seq_length=48, tokens_per_expert=20, batch_size=4)


@pytest.mark.parametrize("family", FAMILIES | IN_PLACE)
@pytest.mark.parametrize("batch_size", [2, 3])
def test_streaming_gives_the_models_own_logits(models, token_ids, family, batch_size):
    stream = LayerStream(Checkpoint(models[family]), token_ids, ComputeOptions(torch.float32, batch_size=batch_size))
    for index in range(len(stream)):
        with stream.layer(index):
            stream.advance(index)
    with stream.head() as head, torch.inference_mode():
        found = torch.stack([head(row) for row in stream.hidden])
        torch.testing.assert_close(found, logits(load(models[family]), token_ids), atol=1e-5, rtol=1e-5)
    assert all(parameter.is_meta for parameter in stream.model.parameters())


def test_sliding_window_layers_get_their_own_masks(tmp_path, token_ids):
    folder = build("mixtral", tmp_path / "m", sliding_window=8)
    stream = LayerStream(Checkpoint(folder), token_ids, ComputeOptions(torch.float32))
    for index in range(len(stream)):
        with stream.layer(index):
            stream.advance(index)
    with stream.head() as head, torch.inference_mode():
        torch.testing.assert_close(head(stream.hidden), logits(load(folder), token_ids), atol=1e-5, rtol=1e-5)


def naive_statistics(folder, rows):
    """The same statistics from a whole model with hooks: {layer: (inputs [T, H], [(token indices, activations)] per expert)}."""
    model = load(folder)
    inputs = {}
    for index, layer in enumerate(model.model.layers):
        found = moe_block(layer)
        if found:
            found[1].register_forward_pre_hook(lambda _, arguments, index=index: inputs.update({index: arguments[0].flatten(0, 1)}))
    logits(model, rows)
    result = {}
    for index, hidden in inputs.items():
        block = moe_block(model.model.layers[index])[1]
        _, _, chosen = block.gate(hidden)
        experts = []
        for expert in range(len(block.experts.down_proj)):
            tokens = (chosen == expert).any(-1).nonzero().flatten()
            gate, up = (hidden[tokens] @ block.experts.gate_up_proj[expert].T).chunk(2, -1)
            experts.append((tokens, block.experts.act_fn(gate) * up))
        result[index] = (hidden, experts)
    return result


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_statistics_are_those_of_the_whole_model(models, family):
    checkpoint = Checkpoint(models[family])
    rows = QUICK.rows(checkpoint)
    collected = {statistics.layer: statistics for statistics in Profile(checkpoint, QUICK, rows)}
    with torch.no_grad():
        expected = naive_statistics(models[family], rows)
    assert collected.keys() == expected.keys()
    for layer, statistics in collected.items():
        hidden, experts = expected[layer]
        torch.testing.assert_close(statistics.inputs, hidden, atol=1e-4, rtol=1e-4)
        for expert, (tokens, activations) in enumerate(experts):
            assert statistics.tokens_routed[expert] == len(tokens)
            if not len(tokens):
                assert expert in statistics.unrouted
                continue
            magnitude = activations.abs()
            close = {"atol": 1e-4, "rtol": 1e-4}
            torch.testing.assert_close(statistics.mean_activation[expert], magnitude.mean(0), **close)
            firing = (magnitude > magnitude.mean(1, keepdim=True)).float().mean(0)
            torch.testing.assert_close(statistics.firing_frequency[expert], firing, atol=1.1 / len(tokens), rtol=0)
            sample = statistics.activations[expert]
            assert len(sample) == min(len(tokens), QUICK.tokens_per_expert)
            nearest = torch.cdist(sample, activations).argmin(1)
            assert len(nearest.unique()) == len(sample)
            assert (nearest.diff() > 0).all()
            torch.testing.assert_close(sample, activations[nearest], **close)
            marks = torch.zeros_like(sample).scatter_(1, sample.abs().topk(sample.shape[1] * 3 // 4, dim=1).indices, 1)
            assert torch.equal(statistics.coactivation(expert), (marks.T @ marks).int())


def test_samples_do_not_depend_on_the_batch_size_but_on_the_seed(models):
    checkpoint = Checkpoint(models["olmoe"])

    def samples(**changes):
        values = {"num_samples": 6, "max_seq_length": 48, "tokens_per_expert": 20, **changes}
        calibration = Calibration(**values)
        return [
            sample for statistics in Profile(checkpoint, calibration, calibration.rows(checkpoint)) for sample in statistics.activations
        ]

    one, other = samples(batch_size=1), samples(batch_size=6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    reseeded = samples(batch_size=1, seed=1)
    assert not all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(one, reseeded, strict=True))


def test_experts_without_tokens_are_run_on_the_layers_inputs(tmp_path):
    folder = build("olmoe", tmp_path / "m")
    checkpoint = Checkpoint(folder)
    stream = LayerStream(checkpoint, QUICK.rows(checkpoint), ComputeOptions(torch.float32))
    stream.model.set_experts_implementation(OBSERVED)
    with stream.layer(0) as layer:
        block = moe_block(layer)[1]
        collector = LayerCollector(0, block.experts, stream.hidden.shape[0] * stream.hidden.shape[1], 20, 0)
        block.experts.prism_collector = collector
        # A router that never picks the last two experts.
        block.gate.register_forward_hook(lambda gate, arguments, output: (output[0], output[1], output[2].clamp(max=3)))
        stream.advance(0)
        statistics = collector.finish()
    assert statistics.unrouted == [4, 5]
    assert statistics.tokens_routed[4:].tolist() == [0, 0]
    assert len(statistics.activations[5]) == 20
    assert statistics.mean_activation[5].isfinite().all()


def write_documents(folder, kind, texts):
    path = folder / f"text.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_text("\n".join(texts))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt", "parquet"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_local_text_of_every_kind(tmp_path, kind, as_folder):
    tokenizer = load_tokenizer(EXAMPLE)
    text = "The quick brown fox jumps over the lazy dog. " * 20
    path = write_documents(tmp_path, kind, [text])
    rows = token_rows([str(tmp_path if as_folder else path)], tokenizer, 4, 16, 0)
    assert rows.shape == (4, 16)
    ids = tokenizer(text)["input_ids"]
    assert all(any(ids[start : start + 16] == row for start in range(len(ids))) for row in rows.tolist())


def test_mix_takes_the_samples_that_each_part_names(tmp_path):
    tokenizer = load_tokenizer(EXAMPLE)
    paths = []
    for word in ("alpha", "beta"):
        (tmp_path / word).mkdir()
        paths.append(write_documents(tmp_path / word, "jsonl", [f"{word} " * 500]))
    specification = Source.parse("org/name[en](validation):7")
    assert specification == Source("org/name", "en", "validation", 7)
    assert Source.parse("name") == Source("name", None, "train", None)
    rows = token_rows([f"{paths[0]}:3", str(paths[1])], tokenizer, 8, 16, 0)
    assert len(rows) == 8
    assert sum("alpha" in tokenizer.decode(row) for row in rows) == 3
    with pytest.raises(UsageError, match="not of the form"):
        Source.parse("name[en:7")
    assert Source.parse("n" * 300).name == "n" * 300


def test_short_text_gives_one_short_row(tmp_path):
    rows = token_rows([str(write_documents(tmp_path, "txt", ["just a few words"]))], load_tokenizer(EXAMPLE), 8, 64, 0)
    assert rows.shape[0] == 1
    assert 2 <= rows.shape[1] < 64


@pytest.mark.parametrize(
    ("kind", "texts", "options", "code", "message"),
    [
        ("jsonl", ["x"], ["--text-column", "body"], 3, "no column 'body'; it has text, id; choose with --text-column"),
        ("jsonl", ["x"], ["--text-column", "id"], 3, "column 'id' holds int, not text"),
        ("txt", [""], [], 3, "holds no text"),
        ("jsonl", [None, ""], [], 3, "holds no text"),
        ("jsonl", [], [], 3, "--dataset"),
        ("jsonl", ["x " * 99], ["--max-seq-length", "4096"], 2, "--max-seq-length 4096: the model takes at most 256"),
    ],
)
def test_bad_text_is_refused_in_one_line(tmp_path, models, command, kind, texts, options, code, message):
    path = write_documents(tmp_path, kind, texts)
    result = command("prism-profile", models["olmoe"], tmp_path / "stats", "--dataset", path, *options)
    assert result.code == code
    assert message in result.err
    assert result.err.count("\n") == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name]


def test_rubbish_and_misdirected_specifications_are_refused_in_one_line(tmp_path, models, command):
    (tmp_path / "bad.jsonl").write_bytes(b"\x00\xff garbage\n")
    for dataset, code, message in (
        (tmp_path / "bad.jsonl", 3, "bad.jsonl: cannot be read"),
        (f"{tmp_path}/bad.jsonl[en]:4", 2, "a local file or folder has no subset"),
    ):
        result = command("prism-profile", models["olmoe"], tmp_path / "stats", "--dataset", dataset)
        assert (result.code, result.err.count("\n")) == (code, 1)
        assert message in result.err


def test_too_little_text_is_reported(tmp_path, models, command):
    path = write_documents(tmp_path, "jsonl", ["some words " * 40])
    result = command("prism-profile", models["olmoe"], tmp_path / "stats", "--dataset", path, "--max-seq-length", "16", "--quiet")
    assert result.code == 0
    rows = json.loads((tmp_path / "stats" / "index.json").read_text())["calibration"]["num_samples"]
    assert f"the text gives {rows} samples of 16 tokens; 256 were asked for" in result.err


def test_missing_text_is_refused(tmp_path, models, command):
    result = command("prism-profile", models["olmoe"], tmp_path / "stats", "--dataset", "no/such.jsonl")
    assert result.code == 3
    assert "no such file or folder" in result.err
    (tmp_path / "empty").mkdir()
    result = command("prism-profile", models["olmoe"], tmp_path / "stats", "--dataset", tmp_path / "empty")
    assert result.code == 3
    assert "needs files of one kind" in result.err


def test_profile_command_writes_what_it_says(tmp_path, models, command):
    stats = tmp_path / "stats"
    options = FAST[:-4]
    result = command("prism-profile", models["qwen2_moe"], stats, *options, "--json")
    assert result.code == 0
    printed = json.loads(result.out)
    assert [layer["layer"] for layer in printed] == [0, 2]
    assert all(layer["tokens_routed"] == 8 * 64 * 2 for layer in printed)
    index = json.loads((stats / "index.json").read_text())
    assert index["layers"] == printed
    assert index["calibration"]["num_samples"] == 8
    stored = list(Statistics(stats, Checkpoint(models["qwen2_moe"])))
    calibration = Calibration(num_samples=8, max_seq_length=64, tokens_per_expert=64)
    checkpoint = Checkpoint(models["qwen2_moe"])
    direct = list(Profile(checkpoint, calibration, calibration.rows(checkpoint)))
    for a, b in zip(stored, direct, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert all(torch.equal(x, y) for x, y in zip(a.activations, b.activations, strict=True))
    table = command("prism-profile", models["qwen2_moe"], stats, *options, "--overwrite")
    assert table.out.splitlines()[0].split("  ")[-1] == "expert numbers below 64 tokens"
    assert len(table.out.splitlines()) == 4
    assert "layer 2 (3/3): rows profiled 8" in table.err
