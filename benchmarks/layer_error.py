"""Layer-output error of a refactored checkpoint with k sub-experts, beside the original with k / N experts, on held-out text.

    python benchmarks/layer_error.py [MODEL_DIR REFACTORED_DIR]

Without arguments refactors examples/olmoe-tiny with the default options. The text is the bundled evaluation text, which shares no
document with the calibration text. Both models' MoE blocks get the inputs they see at full k; the error is the squared error of the
block's output relative to its squared norm, over all tokens.
"""

import sys
import tempfile
from pathlib import Path

import torch
from common import EXAMPLE, print_provenance
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from prism_refactor.calibration.text import EVALUATION_TEXT, load_tokenizer, token_rows
from prism_refactor.cli import app as door
from prism_refactor.cli import refactor
from prism_refactor.formats import PrismConfig
from prism_refactor.models.modeling_prism import attach
from prism_refactor.routing.output import relative_error
from prism_refactor.tables import table


@torch.inference_mode()
def layer_errors(model, rows: torch.Tensor, choices: list[int]) -> list[list[float]]:
    """[layer][choice of k] errors."""
    errors = []

    active = getattr(model, "prism_active", None)

    def measure(block, arguments, output):
        full, layer, per_choice = block.gate.top_k, len(errors), []
        for k in choices:
            if active is None:
                block.gate.top_k = k
            else:
                active.per_layer[layer] = k
            per_choice.append(relative_error(block.forward(*arguments), output))
        block.gate.top_k = full
        if active is not None:
            active.per_layer[layer] = full
        errors.append(per_choice)

    blocks = [layer.mlp for layer in model.model.layers]
    handles = [block.register_forward_hook(measure) for block in blocks]
    model(input_ids=rows)
    for handle in handles:
        handle.remove()
    return errors


def main(model_dir: Path, refactored_dir: Path) -> None:
    rows = token_rows([EVALUATION_TEXT], load_tokenizer(model_dir), samples=16, length=512, seed=0)
    original = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    elastic = attach(AutoModelForCausalLM.from_pretrained(refactored_dir, dtype=torch.float32), refactored_dir)
    stock = AutoModelForCausalLM.from_pretrained(refactored_dir, dtype=torch.float32)
    sub_experts, top_k = PrismConfig(**elastic.config.prism).sub_experts, original.config.num_experts_per_tok
    kept = list(range(1, top_k + 1))
    before = layer_errors(original, rows, kept)
    after = layer_errors(elastic, rows, [sub_experts * k for k in kept])
    plain = layer_errors(stock, rows, [sub_experts * k for k in kept])
    lines = []
    for layer in range(len(before)):
        for position, k in enumerate(kept[:-1]):
            theirs, ours = before[layer][position], after[layer][position]
            half = "<- half" if 2 * k == top_k else ""
            lines.append(
                [
                    layer,
                    f"{k} / {sub_experts * k}",
                    f"{theirs:.4f}",
                    f"{plain[layer][position]:.4f}",
                    f"{ours:.4f}",
                    f"{theirs / ours:.1f} x",
                    half,
                ]
            )
    print(table(["layer", "experts / sub-experts", "original", "stock", "two-level", "original / two-level", ""], lines))


if __name__ == "__main__":
    logging.disable_progress_bar()
    print_provenance()
    if len(sys.argv) == 3:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "refactored"
            assert door.run(refactor.main.command, [str(EXAMPLE), str(target), "--quiet"]) == 0
            main(EXAMPLE, target)
