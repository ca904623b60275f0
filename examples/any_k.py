"""Perplexity of a refactored checkpoint at several numbers of active sub-experts, beside the original at the same cost.

python examples/any_k.py MODEL_DIR REFACTORED_DIR
"""

import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import routers
from calibration import EVALUATION_TEXT, load_tokenizer, token_rows


@torch.inference_mode()
def perplexity(model, rows: torch.Tensor) -> float:
    """exp of the mean next-token cross-entropy over token rows [S, T]."""
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in rows]
    return torch.stack(losses).mean().exp().item()


def main(model_dir: str, refactored_dir: str) -> None:
    """Print the table."""
    logging.disable_progress_bar()
    rows = token_rows([EVALUATION_TEXT], load_tokenizer(model_dir), samples=16, length=512, seed=0)
    original = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(refactored_dir, dtype=torch.float32)
    two_level = routers.attach(AutoModelForCausalLM.from_pretrained(refactored_dir, dtype=torch.float32), refactored_dir)
    sub_experts, top_k = stock.config.prism["sub_experts"], original.config.num_experts_per_tok
    print("             perplexity")
    print("sub-experts  two-level  stock  original at the same cost")
    for k in range(sub_experts * top_k, 0, -2):
        routers.set_active(two_level, k)
        routers.set_active(stock, k)
        beside = "-"
        if k % sub_experts == 0:
            for block in original.model.layers:
                block.mlp.gate.top_k = k // sub_experts
            beside = f"{perplexity(original, rows):.2f} with {k // sub_experts} of {top_k} experts"
        print(f"{k:4d} of {sub_experts * top_k:<4d} {perplexity(two_level, rows):9.2f} {perplexity(stock, rows):7.2f}  {beside}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
