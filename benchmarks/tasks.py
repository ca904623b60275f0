"""Small tasks at every cost: does a task suffer more than perplexity says?

    python benchmarks/tasks.py OUT_DIR [--documents 40] [--shares 0.75 0.5 0.25]

OUT_DIR is a model that prism-refactor wrote; it is whole in memory. lm_eval scores six tasks of multiple choice that this script makes up
from a seed: the last word of a sentence of the bundled evaluation text, sums of one and of two digits, copying words, closing brackets,
and the indentation of the next line. Run are the whole model, k of each share, and a budget of each share. Perplexity is of the same
evaluation text. 'kept' is the mean of (accuracy - chance) / (accuracy of the whole model - chance), over the tasks that the whole model
knows.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import torch
from common import TEXT, markdown, print_provenance, summed_loss
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import prism_refactor
from prism_refactor.calibration.settings import Calibration
from prism_refactor.evaluation.windows import read_windows
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.modeling_prism import full_k

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from lm_tasks import CHOICE, write_task

CHOICES = 4
WORDS = (
    *("river", "stone", "apple", "window", "yellow", "garden", "seven", "paper", "music"),
    *("cloud", "table", "silver", "horse", "letter", "winter", "bread", "circle", "mountain"),
)
Document = dict[str, Any]


def document(question: str, right: str, wrong: list[str], dice: random.Random) -> Document:
    """A question with its choices in random order."""
    choices = [right, *wrong]
    dice.shuffle(choices)
    return {"question": question, "choices": choices, "answer": choices.index(right)}


def sums(digits: int) -> Callable[[random.Random], Document]:
    """Sums of numbers of so many digits, after three that are solved; the wrong answers are near."""

    def make(dice: random.Random) -> Document:
        pairs = [[dice.randrange(10 ** (digits - 1), 10**digits) for _ in range(2)] for _ in range(4)]
        solved = "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs[:3])
        a, b = pairs[3]
        wrong = dice.sample([a + b + away for away in (-11, -10, -2, -1, 1, 2, 10, 11) if a + b + away > 0], CHOICES - 1)
        return document(f"{solved}{a} + {b} =", f" {a + b}", [f" {number}" for number in wrong], dice)

    return make


def copying(dice: random.Random) -> Document:
    """The last of some words that are said again."""
    said = [dice.sample(WORDS, 5) for _ in range(2)]
    shown = "".join(f"{' '.join(words)} -> {' '.join(words)}\n" for words in said[:1])
    *first, last = said[1]
    wrong = dice.sample([word for word in WORDS if word not in said[1]], CHOICES - 1)
    return document(f"{shown}{' '.join(said[1])} -> {' '.join(first)}", f" {last}", [f" {word}" for word in wrong], dice)


def brackets(dice: random.Random) -> Document:
    """The bracket that closes the innermost of some that are open."""
    pairs = {"(": ")", "[": "]", "{": "}"}
    opened = [dice.choice("([{") for _ in range(3)]
    text = "".join(f"{bracket}{dice.choice('abcxyz')}, " for bracket in opened) + dice.choice("abcxyz")
    right = pairs[opened[-1]]
    wrong = [closing for closing in (*pairs.values(), ">") if closing != right]
    return document(f"f(x) = [x, (y, z)]\nvalue = {text}", right, wrong, dice)


def indentation(dice: random.Random) -> Document:
    """The next line of a function at its right depth; the wrong ones are the same line at others."""
    name, value = dice.choice(WORDS), dice.choice("abcxyz")
    depth = dice.randrange(1, 4)
    opened = "".join(f"{'    ' * (level + 1)}{dice.choice(('if', 'while'))} {value} > {level}:\n" for level in range(depth - 1))
    line = f"{value} = {value} + 1"
    choices = [f"{'    ' * level}{line}" for level in range(5) if level != depth]
    return document(f"def {name}({value}):\n{opened}", f"{'    ' * depth}{line}", dice.sample(choices, CHOICES - 1), dice)


def last_words(dice: random.Random) -> list[Document]:
    """Sentences of the handbook without their last word; the wrong ones are last words of others."""
    found = []
    for line in (TEXT / "evaluation.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["domain"] == "handbook":
            found += re.findall(r"(?<=[.!?] )([A-Z][^.!?\n]{60,200}) ([a-z]{4,})\.", record["text"])
    dice.shuffle(found)
    endings = sorted({word for _, word in found})
    return [
        document(start, f" {word}", [f" {other}" for other in dice.sample([end for end in endings if end != word], CHOICES - 1)], dice)
        for start, word in found
    ]


def tasks(count: int) -> dict[str, list[Document]]:
    """The documents of each task."""
    dice = random.Random(0)
    made = {"one digit": sums(1), "two digits": sums(2), "copying": copying, "brackets": brackets, "indentation": indentation}
    return {"last word": last_words(dice)[:count]} | {name: [make(dice) for _ in range(count)] for name, make in made.items()}


class Judge:
    """A model in memory that lm_eval asks.

    Args:
        folder: the checkpoint.
        made: documents by task.
        work: an empty folder for them.
        tokens: of the evaluation text.
    """

    def __init__(self, folder: Path, made: dict[str, list[Document]], work: Path, tokens: int):
        self.model = prism_refactor.load(folder).float()
        self.names = {name: name.replace(" ", "_") for name in made}
        for name, documents in made.items():
            write_task(work, self.names[name], documents, CHOICE)
        self.manager = TaskManager(include_path=str(work), include_defaults=False)
        self.asked = HFLM(pretrained=self.model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=8)
        self.windows = read_windows(Calibration(max_seq_length=512), Checkpoint(folder), 512, tokens)

    @torch.inference_mode()
    def judge(self, **active: Any) -> dict[str, float]:
        """Accuracy of each task, and the perplexity, at an operating point; see `set_active`."""
        prism_refactor.set_active(self.model, **active)
        results = lm_eval.simple_evaluate(self.asked, tasks=[*self.names.values()], task_manager=self.manager, bootstrap_iters=0)["results"]
        found = {name: results[task]["acc,none"] for name, task in self.names.items()}
        return found | {"perplexity": float(torch.tensor(summed_loss(self.model, self.windows) / self.windows.tokens).exp())}


def main(folder: Path, count: int, shares: list[float], tokens: int) -> None:
    made = tasks(count)
    with tempfile.TemporaryDirectory() as work:
        judge = Judge(folder, made, Path(work), tokens)
        full = full_k(judge.model.config)
        points: dict[str, dict[str, Any]] = {"all": {"k": full}}
        for share in shares:
            points |= {f"k, {share:.0%}": {"k": round(share * full)}, f"budget, {share:.0%}": {"budget": share}}
        found = {name: judge.judge(**active) for name, active in points.items()}
    whole, chance = found["all"], 1 / CHOICES
    # What the whole model does not know cannot be lost.
    known = [task for task in made if whole[task] > chance + 0.1]
    if not known:
        raise SystemExit(f"{folder}: even the whole model does none of the tasks better than chance")
    rows = []
    for name, own in found.items():
        kept = sum((own[task] - chance) / (whole[task] - chance) for task in known) / len(known)
        rows.append([name, *(f"{own[task]:.0%}" for task in made), f"{kept:.0%}", f"{own['perplexity']:.2f}"])
    print(f"{folder.name}: {count} documents a task, chance is {chance:.0%}; {judge.windows.tokens} tokens\n")
    print(markdown(["active", *made, "kept", "perplexity"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--documents", type=int, default=40, help="of a task")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--tokens", type=int, default=2048, help="of the evaluation text")
    given = parser.parse_args()
    datasets.disable_progress_bars()
    print_provenance()
    main(given.folder, given.documents, given.shares, given.tokens)
