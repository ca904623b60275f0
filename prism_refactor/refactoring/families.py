"""Which families can be split, and why: `prism-refactor --list-architectures`, `prism-profile --explain`, docs/architectures.md.

python -m prism_refactor.refactoring.families > docs/architectures.md
"""

from pathlib import Path
from typing import Any

import click

from prism_refactor.errors import UsageError
from prism_refactor.models.architectures import ARCHITECTURES, REFUSED, Architecture
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.refactoring.plan import Splits, possible_splits
from prism_refactor.tables import table

_INTRODUCTION = """# Families

Written by `make docs` from the table the product works with (`prism_refactor/models/architectures.py`). Everything else about a family
(tensor names,
layouts, shared experts, dense layers) comes from transformers' own model code and weight conversion. A test splits a small random model of
each family and compares its logits at full k with the source's.

Copies of an expert have equal rows in the router, so at full k all N of an expert that is chosen are chosen. What they weigh together
depends on how scores are made:

- **softmax over all experts**, **softmax over the chosen experts**: N copies share the expert's weight, so `down_proj` is multiplied
  with N.
- **sigmoid**: the same where the chosen scores are divided by their sum (`norm_topk_prob`, or always). Where they are used as they are,
  every copy has the whole weight and nothing is multiplied.

A correction is added to the scores when experts are chosen. It is repeated like a row, and divided by N where copies divide the scores.
A number of shared experts is multiplied with N where their width is that many times the experts' width, which is divided by N.
Layers that predict further tokens are copied byte for byte; `num_nextn_predict_layers` becomes 0, because the sizes are no longer theirs.
"""


def _row(architecture: Architecture) -> list[str]:
    changed = f"{architecture.num_experts}, {architecture.top_k}, {architecture.width}"
    return [architecture.model_type, architecture.scores, changed, architecture.shared or "-", architecture.correction or "-"]


_HEADER = ["model_type", "scores", "sizes in config.json", "shared experts", "correction"]


def page() -> str:
    """docs/architectures.md."""
    lines = [f"| {' | '.join(_HEADER)} |", "|---" * len(_HEADER) + "|"]
    lines += [
        f"| {' | '.join(f'`{cell}`' if '_' in cell or index == 0 else cell for index, cell in enumerate(_row(architecture)))} |"
        for architecture in ARCHITECTURES.values()
    ]
    refused = [f"- `{model_type}`: {reason}." for model_type, reason in REFUSED.items()]
    refused.append("- `deepseek_v3`, `dots1`, `glm4_moe` with `n_group` > 1: the router adds the two best experts of every group to choose")
    refused.append("  among groups, and copies of an expert change that sum. (`deepseek_v2` takes the best one: exact.)")
    refused.append("- quantised checkpoints of any family (MXFP4, FP8, GPTQ, ...): start from the bf16, fp16 or fp32 one.")
    return "\n".join([_INTRODUCTION, *lines, "", "## Refused", *refused])


def listing() -> str:
    """The families as a table, for `--list-architectures`."""
    refused = "\n".join(f"not {model_type}: {reason}" for model_type, reason in REFUSED.items())
    return f"{table(_HEADER, [_row(architecture) for architecture in ARCHITECTURES.values()])}\n{refused}"


def explanation(folder: Path) -> str:
    """How the checkpoint in `folder` would be split.

    Raises:
        InputError, UsageError: it cannot be, with the reason.
    """
    checkpoint = Checkpoint(folder)
    splits = possible_splits(checkpoint)
    if not splits.possible:
        raise UsageError(f"{folder}: no number of sub-experts fits its expert width: {splits.reason}")
    return _explanation(checkpoint, splits)


def _explanation(checkpoint: Checkpoint, splits: Splits) -> str:
    architecture, config = checkpoint.architecture, checkpoint.config
    factor = architecture.factor(config, 2) == 2
    facts: list[tuple[str, Any]] = [
        ("model_type", config.model_type),
        ("layers with experts", f"{len(splits.moe_layers)} of {splits.layers}"),
        *architecture.sizes(config).items(),
        ("scores", architecture.scores),
        ("down_proj", "multiplied with N, because N copies share an expert's weight" if factor else "unchanged: copies keep the weight"),
        ("correction", architecture.correction or "none"),
        ("weights", splits.dtype),
        ("--sub-experts", ", ".join(map(str, splits.possible))),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.rjust(width)}  {value}" for name, value in facts]
    return "\n".join([f"{checkpoint.path} can be split:", *lines])


if __name__ == "__main__":
    click.echo(page())
