"""Which families can be split, and how: `prism-refactor --list-architectures`, `prism-profile --explain`, docs/architectures.md.

    python -m prism_refactor.refactoring.families

tries every Mixture-of-Experts config class of the installed transformers, and writes what it finds to proven.json beside this file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from prism_refactor.errors import InputError, UsageError
from prism_refactor.files import write_json
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.dense import TWINS, Twin, has_twin
from prism_refactor.models.discovery import discover
from prism_refactor.models.modeling_prism import auto_class
from prism_refactor.models.proof import Proof
from prism_refactor.models.transformers_models import build_meta_model
from prism_refactor.refactoring.plan import Splits, possible_splits
from prism_refactor.tables import table

PROVEN = Path(__file__).with_name("proven.json")
# What a published config.json has and the class's defaults lack, or have wrong.
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
_ERNIE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [22, 22, 20]}}
_INDEXER = {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048, "indexer_compress_ratio": 4}
_GEMMA4 = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704, "hidden_size_per_layer_input": 0}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense", *["sparse"] * 11]}},
    "deepseek_ocr2_text": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense", *["sparse"] * 11]},
    "deepseek_v2": {"num_experts_per_tok": 6, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "norm_topk_prob": True},
    "ernie4_5_vl_moe": {"text_config": _ERNIE},
    "ernie4_5_vl_moe_text": _ERNIE,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "glm4v_moe": {"text_config": {"head_dim": 128, "rope_parameters": _SECTIONS}},
    "glm4v_moe_text": {"head_dim": 128, "rope_parameters": _SECTIONS},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "step3p5": {"sliding_window": 512},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "mimo_v2_flash": {"head_dim": 192, "v_head_dim": 128, "num_key_value_heads": 4},
}

_INTRODUCTION = """# Families

Written by `make docs` with transformers {version}: {count} families of Mixture-of-Experts models can be split, {in_place} more for the
two-level router only. No list decides. For every config, `prism-refactor` builds a small random model of the same kind, finds which config
keys set the number of experts, their width and the number that a token uses, splits the experts, and compares. A family that is not in
this table is tried in the same way. `prism-profile --explain MODEL_DIR` prints what is found for a checkpoint.

A split is accepted when logits and the outputs of all experts modules are equal at full k, for the stock router and for the two-level
router, and when every other way to split is at least ten times further off. The differences below are the largest ones, in float32.

The proof runs at the start of every run, for the checkpoint's own config. Long tests run `prism-refactor` and `prism-verify` on a small
model of every family that is a language model of its own (`tests/test_families.py`); offloading and other commands run on the families in
`tests/conftest.py`, two of which take images and text. The table counts a model of images and text and its text part as two.

Where layers give the next one more than hidden states (`glm_moe_dsa`, `hy_v4`, `mistral_large4`: the positions that attention may look at;
`zaya`: what its router remembers), these are kept in memory for all of the text. The estimate of `--dry-run` does not count them. An
interrupted run passes the text through the finished layers again.

How it is exact: copies of an expert have equal rows in the router, so at full k all N of an expert that is chosen are chosen.

- `down_proj` is multiplied with N where the N copies share the expert's weight, as a softmax makes them do. It is unchanged where every
  copy has the whole weight.
- A correction is added to the scores when experts are chosen. It is repeated like a row, and divided by N where copies divide the scores.
- A number of shared experts is multiplied with N where their width is that many times the experts' width, which is divided by N.
- Where the router chooses among groups of experts by the sum of their best, every group becomes N groups, which hold one sub-expert of
  each expert: the sum stays what it was.
- Layers that predict further tokens are copied as they are; their number (`num_nextn_predict_layers`) becomes 0, because the sizes are no
  longer theirs.
"""
_IN_PLACE = """## Two-level only

The classes of these families cannot run split experts, for the reason beside them. Their checkpoint is the original, with each expert's
neurons in another order: a plain load, in transformers or another engine, is the original. `prism_refactor.load` and `trust_remote_code`
cut the experts in memory, a layer at a time, and route them by two levels. `--router replicate`, offloading, and the vLLM plugin refuse
such a checkpoint. "plain": the largest difference between the original and the plain load.
"""
_IN_PLACE_HEADER = ["model_type", "config keys", "plain", "two-level", "why"]
_DENSE = """## Dense models

A dense model is read as a Mixture of Experts of one expert, in a family whose attention and norms are the same; see [dense.md](dense.md).
"as read": the largest difference of a logit between a small random dense model and that.
"""
_AROUND = """
A model of images and text is split where its text model is one of these; its other parts are copied. transformers builds these, with the
default config of their classes, around a text model that is read so: {names}.
"""
_DENSE_HEADER = ["dense model_type", "read as", "as read", "stock", "two-level"]
_HEADER = ["model_type", "config keys", "down_proj", "divided by N", "groups", "stock", "two-level"]


def config_of(model_type: str) -> Any:
    """Return a config of a model type with the defaults of its class, or what published models have instead."""
    return CONFIG_MAPPING[model_type](**_PUBLISHED.get(model_type, {}))


def _config_classes() -> Iterator[tuple[str, Any]]:
    """(model_type, config) of every class of transformers whose config has experts."""
    for model_type in CONFIG_MAPPING:
        try:
            config = config_of(model_type)
            keys = config.get_text_config().to_dict().keys()
        except Exception:
            continue
        if any(word in key for key in keys for word in ("experts", "moe")):
            yield model_type, config


def survey() -> dict[str, Any]:
    """Try every family; returns what proven.json holds."""
    families: dict[str, Any] = {}
    for model_type, config in _config_classes():
        families[model_type] = try_family(config)
        click.echo(f"{model_type}: {families[model_type].get('reason', 'proven')}", err=True)
    dense = {model_type: try_dense(CONFIG_MAPPING[model_type]()) for model_type in sorted(TWINS)}
    known = {"families": dict(sorted(families.items())), "dense": dense, "around": list(_around_dense())}
    return {"transformers": transformers.__version__} | known


def _around_dense() -> Iterator[str]:
    """Model types of images and text around a dense text model that is split."""
    for model_type in sorted(CONFIG_MAPPING):
        try:
            config = CONFIG_MAPPING[model_type]()
            if auto_class(config) is AutoModelForImageTextToText and has_twin(config):
                build_meta_model(Twin(config).config, torch.float32)
                yield model_type
        except Exception as error:
            click.echo(f"{model_type}: {error}", err=True)


def try_dense(config: Any) -> dict[str, Any]:
    """Return what proven.json says about a dense model type: its `twin`, and largest differences of a logit."""
    twin = Twin(config)
    return {"twin": twin.config.model_type, "read": float(f"{twin.difference:.1e}")} | try_family(twin.config)


def try_family(config: Any) -> dict[str, Any]:
    """Return what proven.json says about a family: how it is split, or the 'reason' why not."""
    try:
        proof = discover(config.get_text_config())
    except InputError as error:
        return {"reason": str(error)}
    architecture = proof.architecture
    return ({"two_level_only": proof.obstacle} if proof.obstacle else {}) | {
        "keys": list(architecture.keys),
        "shared_weight": architecture.shared_weight,
        "divided": list(architecture.divided),
        "grouped": architecture.grouped,
        "carried": list(architecture.carried),
        "stock": float(f"{proof.stock:.1e}"),
        "two_level": float(f"{proof.two_level:.1e}"),
    }


def _row(model_type: str, found: dict[str, Any]) -> list[str]:
    return [
        model_type,
        ", ".join(found["keys"]),
        "x N" if found["shared_weight"] else "unchanged",
        ", ".join(found["divided"]) or "-",
        found["grouped"] or "-",
        f"{found['stock']:.1e}",
        f"{found['two_level']:.1e}",
    ]


def _parts(known: dict[str, Any]) -> tuple[list[list[str]], list[list[str]], dict[str, str]]:
    """Rows of the families that can be split, of those that can be for the two-level router only, and the reasons why others cannot."""
    families = known["families"]
    in_place = {model_type: found for model_type, found in families.items() if "two_level_only" in found}
    refused = {model_type: found["reason"] for model_type, found in families.items() if "reason" in found}
    rows = [_row(model_type, found) for model_type, found in families.items() if model_type not in in_place.keys() | refused.keys()]
    return rows, [_in_place_row(model_type, found) for model_type, found in in_place.items()], refused


def _in_place_row(model_type: str, found: dict[str, Any]) -> list[str]:
    return [model_type, ", ".join(found["keys"]), f"{found['stock']:.1e}", f"{found['two_level']:.1e}", found["two_level_only"]]


def page() -> str:
    """docs/architectures.md."""
    known = json.loads(PROVEN.read_text())
    rows, in_place, refused = _parts(known)
    lines = [_INTRODUCTION.format(version=known["transformers"], count=len(rows), in_place=len(in_place))]
    lines += _markdown(_HEADER, rows)
    lines += ["", _IN_PLACE, *_markdown(_IN_PLACE_HEADER, in_place)]
    lines += ["", _DENSE, *_markdown(_DENSE_HEADER, _dense_rows(known))]
    lines += [_AROUND.format(names=", ".join(f"`{name}`" for name in known["around"]))]
    lines += ["## Not split", "", "With the class's default config, by what was found:", ""]
    lines += [f"- `{model_type}`: {reason}" for model_type, reason in refused.items()]
    lines.append("- checkpoints of any family quantised in a way that [quantised.md](quantised.md) does not list: dequantise them first")
    return "\n".join(lines)


def _dense_rows(known: dict[str, Any]) -> list[list[str]]:
    return [
        [model_type, found["twin"], f"{found['read']:.1e}", f"{found['stock']:.1e}", f"{found['two_level']:.1e}"]
        for model_type, found in known["dense"].items()
    ]


def _markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [
        f"| {' | '.join(f'`{cell}`' if '_' in cell or index == 0 else cell for index, cell in enumerate(row))} |" for row in rows
    ]


def listing() -> str:
    """The families as a table, for `--list-architectures`."""
    known = json.loads(PROVEN.read_text())
    rows, in_place, refused = _parts(known)
    only = table(_IN_PLACE_HEADER, in_place)
    dense = table(_DENSE_HEADER, _dense_rows(known))
    reasons = "\n".join(f"not {model_type}: {reason}" for model_type, reason in refused.items())
    proven = f"proven with transformers {known['transformers']}; another family is tried when it comes: prism-profile --explain MODEL_DIR"
    return f"{table(_HEADER, rows)}\n\ntwo-level only\n{only}\n\n{dense}\n\n{reasons}\n{proven}"


def explanation(folder: Path) -> str:
    """How the checkpoint in `folder` would be split.

    Raises:
        InputError, UsageError: it cannot be, with the reason.
    """
    checkpoint = Checkpoint(folder)
    splits = possible_splits(checkpoint)
    if not splits.possible:
        raise UsageError(f"{folder}: no number of sub-experts fits its expert width: {splits.reason}")
    return _explanation(checkpoint, splits, discover(checkpoint.text_config))


def _explanation(checkpoint: Checkpoint, splits: Splits, proof: Proof) -> str:
    architecture, config = proof.architecture, checkpoint.config
    copies = (
        "multiplied with N, because N copies share an expert's weight"
        if architecture.shared_weight
        else "unchanged: copies keep the weight"
    )
    facts: list[tuple[str, Any]] = [
        ("model_type", _read_as(checkpoint) if checkpoint.dense else config.model_type),
        ("layers with experts", f"{len(splits.moe_layers)} of {splits.layers}"),
        ("experts", proof.experts),
        *architecture.sizes(config).items(),
        *(
            [
                ("down_proj", copies),
                ("divided by N", ", ".join(architecture.divided) or "none"),
                ("groups of experts", architecture.groups(config)),
            ]
            if architecture.stock
            else []
        ),
        ("weights", splits.dtype),
        ("--sub-experts", ", ".join(map(str, splits.possible))),
        (
            "proof",
            f"a small random model of its kind, split in two: largest difference {proof.stock:.1e} with the stock router, "
            f"{proof.two_level:.1e} with the two-level one; of the next best split {proof.runner_up:.1e}",
        ),
    ]
    if proof.obstacle:
        proven = f"a small random model of its kind: largest difference {proof.stock:.1e} with neurons in another order, "
        facts[-1] = ("proof", f"{proven}{proof.two_level:.1e} with its experts split in two and the two-level router")
        facts.append(("two-level only", f"its own classes cannot run split experts: {proof.obstacle}"))
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.rjust(width)}  {value}" for name, value in facts]
    return "\n".join([f"{checkpoint.path} can be split:", *lines])


def _read_as(checkpoint: Checkpoint) -> str:
    read = f"a dense {checkpoint.dense}, read as a {checkpoint.text_config.model_type} of one expert"
    return f"{checkpoint.config.model_type} around {read}" if checkpoint.text_config is not checkpoint.config else read


if __name__ == "__main__":
    write_json(PROVEN, survey())
    click.echo(page())
