"""Quantised sources: FP8 whose blocks are not whole, and MXFP4, against the same checkpoint dequantised by hand."""

import json

import pytest
import torch
from conftest import FAST, FP4_VALUES, quantise_fp8, quantise_mxfp4, quantise_packed
from safetensors.torch import load_file, save_file

from prism_refactor.models.quantised import dequantise_fp8, dequantise_mxfp4

SOURCES = {
    "deepseek_v3": lambda source, folder: quantise_fp8(source, folder, block=(16, 16)),
    "qwen3_moe": lambda source, folder: quantise_fp8(source, folder, block=(12, 20)),
    "minimax_m2": lambda source, folder: quantise_fp8(source, folder, block=None),
    "gpt_oss": quantise_mxfp4,
    # Kimi-K2-Thinking is a DeepSeek-V3 of 4-bit integers in groups.
    "deepseek_v3-grouped": lambda source, folder: quantise_packed(source, folder, bits=4, group=8),
    "mixtral": lambda source, folder: quantise_packed(source, folder, bits=8, group=None),
}


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("family", SOURCES)
def test_a_quantised_source_gives_what_its_dequantised_twin_gives(models, tmp_path, command, family):
    twin = SOURCES[family](models[family], tmp_path / "quantised")
    for name in ("quantised", "twin"):
        result = command("prism-refactor", tmp_path / name, tmp_path / f"{name}-out", "--sub-experts", 2, *FAST)
        assert result.code == 0, result.err
    assert twin == tmp_path / "twin"
    found, expected = tensors(tmp_path / "quantised-out"), tensors(tmp_path / "twin-out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    config = json.loads((tmp_path / "quantised-out" / "config.json").read_text())
    assert "quantization_config" not in config
    verified = command("prism-verify", tmp_path / "quantised", tmp_path / "quantised-out")
    assert verified.code == 0, verified.err
    assert "it was read as bfloat16" in (tmp_path / "quantised-out" / "README.md").read_text()


def test_the_plan_says_that_weights_are_dequantised(models, tmp_path, command):
    quantise_mxfp4(models["gpt_oss"], tmp_path / "quantised")
    plan = command("prism-refactor", tmp_path / "quantised", tmp_path / "out", "--dry-run", *FAST)
    assert plan.code == 0, plan.err
    assert "weights: mxfp4 in the source, written as bfloat16" in plan.out


def test_fp8_of_every_kind_of_scale():
    torch.manual_seed(0)
    values = torch.randn(2, 5, 7).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, 2)
    blocks = dequantise_fp8(values, scales, (2, 4))
    for expert in range(2):
        for row in range(5):
            for column in range(7):
                expected = (values[expert, row, column].float() * scales[expert, row // 2, column // 4]).bfloat16()
                assert blocks[expert, row, column] == expected
    rows = torch.rand(5, 1)
    assert torch.equal(dequantise_fp8(values[0], rows, (1, 7)), (values[0].float() * rows).bfloat16())
    assert torch.equal(dequantise_fp8(values[0], torch.tensor(0.5), (5, 7)), (values[0].float() * 0.5).bfloat16())


def test_mxfp4_of_every_value_and_exponent():
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = (codes[0::2] | (codes[1::2] << 4)).expand(1, 3, 2, 8).contiguous()
    scales = torch.tensor([[[0, 127], [120, 130], [254, 1]]], dtype=torch.uint8)
    found = dequantise_mxfp4(blocks, scales)
    assert found.shape == (1, 32, 3)
    for row in range(3):
        for group in range(2):
            expected = torch.tensor(FP4_VALUES).double() * 2.0 ** (int(scales[0, row, group]) - 127)
            assert torch.equal(found[0, 16 * group : 16 * group + 16, row], expected.bfloat16())


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder, end):
    found = load_file(folder / "model.safetensors")
    name = next(name for name in found if name.endswith(end))
    del found[name]
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def add(folder, end):
    """A tensor beside the first whose name begins as `end`'s does."""
    found = load_file(folder / "model.safetensors")
    name = next(name for name in found if name.endswith("w1.weight_packed"))
    found[name.removesuffix("w1.weight_packed") + end] = torch.zeros(1)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def weights_are(folder, **changes):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"] |= changes
    edit(folder, quantization_config=config)


@pytest.mark.parametrize(
    ("family", "damage", "said"),
    [
        (
            "qwen3_moe",
            lambda folder: edit(folder, quantization_config={"quant_method": "awq", "bits": 4}),
            "by 'awq', which is not",
        ),
        ("qwen3_moe", lambda folder: edit(folder, quantization_config={"quant_method": "gptq"}), "dequantise it first"),
        ("qwen3_moe", lambda folder: edit(folder, quantization_config={}), "quantised: it has a tensor"),
        ("qwen3_moe", lambda folder: drop(folder, "_scale_inv"), "is FP8 and has no"),
        (
            "qwen3_moe",
            lambda folder: edit(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]}),
            "not for blocks of [16, 16]",
        ),
        (
            "qwen3_moe",
            lambda folder: edit(folder, quantization_config={"quant_method": "fp8", "weight_block_size": "16"}),
            "a block of size 16",
        ),
        ("gpt_oss", lambda folder: drop(folder, "_scales"), "complete the checkpoint"),
        ("gpt_oss", lambda folder: drop(folder, "_blocks"), "complete the checkpoint"),
        ("mixtral", lambda folder: drop(folder, "_scale"), "of a shape that fits"),
        ("mixtral", lambda folder: weights_are(folder, num_bits=3), "packed 3-bit numbers"),
        ("mixtral", lambda folder: weights_are(folder, type="float"), "numbers of type float"),
        ("mixtral", lambda folder: weights_are(folder, group_size=64), "of a shape that fits"),
        ("mixtral", lambda folder: add(folder, "w1.weight_zero_point"), "has a zero point"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_name(models, tmp_path, command, family, damage, said):
    SOURCES[family](models[family], tmp_path / "quantised")
    damage(tmp_path / "quantised")
    result = command("prism-refactor", tmp_path / "quantised", tmp_path / "out", *FAST)
    assert result.code == 3
    assert said in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
