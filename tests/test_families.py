"""Every family that is listed as one that can be split, through the commands."""

import json
import shutil

import pytest
import torch
from conftest import EXAMPLE, FAST, TOKENIZER_FILES
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from prism_refactor.models.discovery import config_values, reduced
from prism_refactor.models.proof import random_model
from prism_refactor.refactoring import families

PROVEN = {name for name, found in json.loads(families.PROVEN.read_text())["families"].items() if "reason" not in found}
# Of the others, which are models of images or sounds and text or a part of one, some are in `conftest.FAMILIES`.
LANGUAGE_MODELS = sorted(name for name in PROVEN if CONFIG_MAPPING[name] in MODEL_FOR_CAUSAL_LM_MAPPING and f"{name}_text" not in PROVEN)


def rounding(model):
    """How far some of a model's logits move when its embeddings are rounded otherwise: so far may two ways to compute them differ."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 64), generator=generator)
    weight = model.get_input_embeddings().weight
    exact, moved = weight.clone(), 0.0
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, use_cache=False).logits
        for _ in range(4):
            weight.copy_(exact * (1 + torch.finfo(exact.dtype).eps * torch.randn(exact.shape, generator=generator)))
            moved = max(moved, (model(input_ids=ids, use_cache=False).logits - expected).abs().max().item())
    return moved


@pytest.mark.long
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_small_model_of_the_family_is_the_same_after_the_commands(tmp_path, command, family):
    config = families.config_of(family)
    assert config.get_text_config() is config
    small = type(config).from_dict(config_values(reduced(config)) | {"vocab_size": 4096})
    model = random_model(small)
    model.save_pretrained(tmp_path / "model")
    for name in TOKENIZER_FILES:
        shutil.copy(EXAMPLE / name, tmp_path / "model" / name)
    result = command("prism-refactor", tmp_path / "model", tmp_path / "out", *FAST, "--sub-experts", "2")
    assert result.code == 0, result.err
    options = ["--num-samples", "2", "--max-seq-length", "64", "--tolerance", str(max(0.0001, rounding(model)))]
    result = command("prism-verify", tmp_path / "model", tmp_path / "out", *options)
    assert result.code == 0, result.err
