"""Quality against cost: what the parts of the two-level router are worth, on one text, at 1/8 to 3/4 of the sub-experts.

    python benchmarks/frontier.py OUT_DIR... [--tokens 8192] [--text TEXT.jsonl] [--picture frontier.svg]

Each OUT_DIR is a model that prism-refactor wrote from the same original with the linear router; one is whole in memory. Perplexity, KL
divergence to the full model (nats a token), and how often the most likely token is the full model's, beside what a token costs with router
and compensation: floating-point operations, and bytes of the weights that take part, in the checkpoint's type, with all of the embedding.
Compared are:

- selection: nothing in the place of what is dropped;
- k: with the compensation, the same number of sub-experts for every token;
- budget: with the compensation, each token running what it needs, and the share on average.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from common import markdown, print_provenance

import prism_refactor
from prism_refactor.calibration.settings import Calibration
from prism_refactor.evaluation.cost import CostModel
from prism_refactor.evaluation.windows import Windows, read_windows
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.modeling_prism import full_k, moe_blocks
from prism_refactor.models.refactored import RefactoredCheckpoint

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
LENGTH = 512


@dataclass
class Found:
    """Figures of one way at one share: perplexity, KL divergence to the full model, agreement with its most likely tokens, cost."""

    perplexity: float
    divergence: float
    agreement: float
    mflops: float
    megabytes: float

    def cells(self) -> list[str]:
        return [f"{self.mflops:.2f}", f"{self.megabytes:.2f}", f"{self.perplexity:.2f}", f"{self.divergence:.3f}", f"{self.agreement:.1%}"]


class Model:
    """A refactored model in memory, with the log probabilities that it gives at full k.

    Args:
        folder: the checkpoint.
        tokens: of the text.
        text: JSON Lines; None: the bundled evaluation text.
    """

    def __init__(self, folder: Path, tokens: int, text: Path | None):
        checkpoint = RefactoredCheckpoint(folder)
        self.model = prism_refactor.load(folder).float()
        self.model.set_experts_implementation(EXPERTS)
        self.routers = [block.experts.two_level for block in moe_blocks(self.model)]
        self.full = full_k(self.model.config)
        calibration = Calibration(datasets=(str(text),) if text else (), max_seq_length=LENGTH)
        # Windows side by side.
        self.windows: Windows = read_windows(calibration, checkpoint, LENGTH, tokens)
        self.cost = CostModel(checkpoint, "two-level", LENGTH)
        self.itemsize = (checkpoint.dtype or torch.float32).itemsize
        self.exact = self._scores()

    def _scores(self) -> list[torch.Tensor]:
        """Log probabilities [scored tokens, V] of each window."""
        found = []
        for row, scored in zip(self.windows.rows, self.windows.scored, strict=True):
            logits = self.model(input_ids=row[None]).logits[0, :-1][scored[1:]]
            found.append(logits.float().log_softmax(-1))
        return found

    def measure(self, share: float, set_up: Callable[[Any], None], budget: bool = False) -> Found:
        """Run at a share of the sub-experts; `set_up` changes each layer's router before."""
        skipped = self.routers[0].num_experts * self.routers[0].sub_experts
        ran: list[list[torch.Tensor]] = [[] for _ in self.routers]
        hooks = [
            router.register_forward_hook(lambda _, __, output, place=place: ran[place].append((output[1] != skipped).sum(1)))
            for place, router in enumerate(self.routers)
        ]
        kept = [dict(router._buffers) for router in self.routers]
        for router in self.routers:
            set_up(router)
        prism_refactor.set_active(self.model, **({"budget": share} if budget else {"k": round(share * self.full)}))
        scores = self._scores()
        for router, buffers, hook in zip(self.routers, kept, hooks, strict=True):
            router._buffers.update(buffers)
            hook.remove()
        active = [torch.cat(each).double().mean().item() for each in ran]
        targets = [row[1:][scored[1:]] for row, scored in zip(self.windows.rows, self.windows.scored, strict=True)]
        loss = sum(F.nll_loss(own, target, reduction="sum").item() for own, target in zip(scores, targets, strict=True))
        pairs = list(zip(self.exact, scores, strict=True))
        divergence = sum((full.exp() * (full - own)).sum().item() for full, own in pairs)
        agreement = sum((full.argmax(-1) == own.argmax(-1)).sum().item() for full, own in pairs)
        count = self.windows.tokens
        cost = self.cost.at(active)
        perplexity = torch.tensor(loss / count).exp().item()
        return Found(perplexity, divergence / count, agreement / count, cost.flops / 1e6, cost.active_parameters * self.itemsize / 1e6)


def bare(router: Any) -> None:
    """Let a router put nothing in the place of what is dropped."""
    router._buffers.pop("compensation")


def as_is(_: Any) -> None:
    """Leave a router as it is."""


WAYS: dict[str, tuple[Callable[[Any], None], bool]] = {"selection": (bare, False), "k": (as_is, False), "budget": (as_is, True)}


def draw(found: dict[str, list[Found]], path: Path) -> None:
    """Perplexity against operations of each way."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, points in found.items():
        axes.plot([point.mflops for point in points], [point.perplexity for point in points], marker="o", label=name)
    axes.set(xlabel="MFLOPs per token", ylabel="perplexity", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main(folders: list[Path], tokens: int, text: Path | None, picture: Path | None) -> None:
    found: dict[str, list[Found]] = {}
    for folder in folders:
        model = Model(folder, tokens, text)
        full = model.measure(1, as_is)
        print(f"{folder.name}, {text or 'bundled evaluation text'}: {model.windows.tokens} tokens; full model: {full.perplexity:.2f}\n")
        for name, (set_up, budget) in WAYS.items():
            if not budget or hasattr(model.routers[0], "threshold"):
                found[f"{folder.name}, {name}"] = [model.measure(share, set_up, budget) for share in SHARES]
    rows = [[f"{share:.1%}", name, *points[place].cells()] for place, share in enumerate(SHARES) for name, points in found.items()]
    print(markdown(["share", "way", "MFLOPs", "MB", "perplexity", "KL", "same token"], rows))
    if picture:
        draw(found, picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="OUT_DIR")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text")
    parser.add_argument("--text", type=Path, help="JSON Lines in the place of the bundled evaluation text")
    parser.add_argument("--picture", type=Path, help="draw the curves (.svg, .png)")
    given = parser.parse_args()
    matplotlib.use("Agg")
    torch.set_grad_enabled(False)
    print_provenance()
    main(given.folders, given.tokens, given.text, given.picture)
