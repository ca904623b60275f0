"""vLLM with the plugin prism-vllm against transformers: quality, equality in mixed batches, every family, and what routing costs.

    python benchmarks/vllm.py [--venv DIR] [--parts quality,families,cost] [REFACTORED_DIR]

Without REFACTORED_DIR refactors examples/olmoe-tiny with the default options. vLLM gets a virtual environment of its own, DIR or
.venv-vllm-VERSION; see vllm_plugin/tests/vllm_server.py. Every figure of vLLM comes from `vllm serve` over HTTP, in float32.
"""

import argparse
import math
import re
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from common import EXAMPLE, markdown, print_provenance
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import prism_refactor
from prism_refactor.calibration.settings import Calibration
from prism_refactor.evaluation.windows import read_windows
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.loading import load
from prism_refactor.models.modeling_prism import auto_class
from prism_refactor.routing.compensation import map_rank

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "vllm_plugin" / "tests"), str(ROOT / "vllm_plugin")]

from prism_vllm.routing import SubRouter, route
from reference import FAMILIES, IN_BFLOAT16, QUICK, difference, greedy, log_probabilities, random_model, random_text
from vllm_server import CHOICES, EAGER, PROMPTS, VERSION, Server, prepare, serving

WINDOWS, LENGTH, ROUNDS = 8, 511, 3
WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "eager": ([EAGER, "--max-num-seqs", "64"], {}),
    "compiled": (["--max-num-seqs", "64"], {}),
    "prompts in pieces of 192": ([EAGER, "--max-num-batched-tokens", "192", "--max-num-seqs", "64"], {}),
    "tensor parallel, 2 ranks": ([EAGER, "--tensor-parallel-size", "2"], {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
}


class Reference:
    """What transformers computes with the two-level router and with the stock one: {k: ...}."""

    def __init__(self, folder: Path):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        windows = read_windows(Calibration(max_seq_length=LENGTH), Checkpoint(EXAMPLE), LENGTH)
        # Not from the domain with the Japanese document, on which the model is better with fewer experts.
        usable = [number for number, domain in enumerate(windows.domains) if domain != "perlpod"]
        self.texts = [windows.rows[usable[place * len(usable) // WINDOWS]].tolist() for place in range(WINDOWS)]
        self.prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
        self.two_level, self.stock, self.greedy = {}, {}, {}
        model = prism_refactor.load(folder).float()
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        for k in CHOICES:
            prism_refactor.set_active(model, k)
            prism_refactor.set_active(plain, k)
            self.two_level[k] = [log_probabilities(model, text) for text in self.texts]
            self.stock[k] = [log_probabilities(plain, text) for text in self.texts]
            self.greedy[k] = [greedy(model, prompt) for prompt in self.prompts]


def perplexity(found: list[torch.Tensor]) -> str:
    return f"{math.exp(-torch.cat(found).double().mean().item()):.5f}"


def mixed_equal(server: Server, requests: int) -> str:
    """How many of some concurrent requests of all k get what they get alone."""
    pairs = [(PROMPTS[number % len(PROMPTS)] + " x" * (number // len(PROMPTS)), 1 + number % max(CHOICES)) for number in range(requests)]
    alone = [server.tokens(*pair) for pair in pairs]
    return f"{sum(one == other for one, other in zip(server.all(server.tokens, pairs), alone, strict=True))} / {requests}"


def quality(python: Path, folder: Path) -> None:
    """All k of a text in one batch, against transformers."""
    reference, rows, mixed = Reference(folder), [], []
    for name, (options, environment) in WAYS.items():
        with serving(python, folder, *options, **environment) as server:
            pairs = [(text, k) for k in CHOICES for text in reference.texts]
            found = [torch.tensor(each) for each in server.all(server.log_probabilities, pairs)]
            tokens = server.all(server.tokens, [(prompt, k) for k in CHOICES for prompt in reference.prompts])
            for number, k in enumerate(CHOICES):
                own = found[number * WINDOWS : (number + 1) * WINDOWS]
                same = zip(tokens[number * len(PROMPTS) : (number + 1) * len(PROMPTS)], reference.greedy[k], strict=True)
                expected = reference.two_level[k]
                compared = [perplexity(own), f"{difference(own, expected):.1e}", f"{sum(a == b for a, b in same)} / {len(PROMPTS)}"]
                rows.append([name, k, perplexity(reference.stock[k]), perplexity(expected), *compared])
            mixed.append([name, *(mixed_equal(server, requests) for requests in (1, 3, 64)), f"{server.seconds:.0f}"])
    scored = WINDOWS * (LENGTH - 1)
    print(f"{scored} tokens in {WINDOWS} windows, all k in one batch; {len(PROMPTS)} prompts of 24 greedy tokens\n")
    columns = ["", "k", "stock, transformers", "two-level, transformers", "two-level, vLLM", "largest difference of a log probability"]
    print(markdown([*columns, "equal greedy tokens"], rows))
    print("\nrequests of mixed k at once, and how many get what they get alone\n")
    print(markdown(["", "1", "3", "64", "start, s"], mixed))


def compare(python: Path, folder: Path, model: Any, text: list[int], choices: list[int | None]) -> str:
    """Largest difference of a log probability between vLLM and a model in transformers at some k, or why vLLM does not run it.

    Both compute in the model's type.
    """
    expected = []
    for k in choices:
        if k is not None:
            prism_refactor.set_active(model, k)
        expected.append(log_probabilities(model, text))
    try:
        with serving(python, folder, EAGER, "--dtype", str(model.dtype).removeprefix("torch.")) as server:
            found = server.all(server.log_probabilities, [(text, k) for k in choices])
    except AssertionError as error:
        # The first is the cause, the others say that the engine has failed.
        lines = [line.rpartition("] ")[2].strip() for line in str(error).splitlines() if re.search(r"ERROR.*\w+Error: ", line)]
        return (lines or ["did not start"])[0][:200]
    return f"{difference(found, expected):.1e}"


def family_row(python: Path, family: str, scratch: Path) -> list[Any]:
    """A random model of a family, as it is and refactored with both routers, at full k, three quarters, half and 1."""
    source, text, dtype = random_model(family, scratch / family), random_text(), torch.bfloat16 if family in IN_BFLOAT16 else torch.float32
    family_class = auto_class(AutoConfig.from_pretrained(source))
    row = [family, compare(python, source, family_class.from_pretrained(source, dtype=dtype), text, [None])]
    for router in ("linear", "proxy"):
        folder = scratch / f"{family}-{router}"
        prism_refactor.refactor(source, folder, router=router, **QUICK)
        model = load(folder, dtype=dtype)
        full = max(model.prism_active.per_layer)
        row.append(compare(python, folder, model, text, [full, full * 3 // 4, full // 2, 1]))
    return row


def families(python: Path, names: list[str]) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for family in names:
            try:
                rows.append(family_row(python, family, Path(scratch)))
            except Exception:
                rows.append([family, traceback.format_exc().splitlines()[-1]])
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print("largest difference of a log probability between vLLM and transformers, or why vLLM does not run it\n")
    print(markdown(["family", "original", "two-level, linear", "two-level, proxy"], rows))


class Operations(TorchDispatchMode):
    """Counts operations that compute something: not views, not what makes an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += not (isinstance(result, torch.Tensor) and result._is_view())
        return result


def routing_cost() -> None:
    """Operations and microseconds of one layer's routing function, of OLMoE-1B-7B's size, before and after compiling."""
    experts, parts, top_k, hidden = 64, 4, 8, 2048
    tensors = {
        "weight": torch.randn(experts, parts, hidden) / 40,
        "bias": torch.randn(experts, parts),
        "ceiling": torch.randn(experts, parts) + 3,
        "compensation": torch.randn(2, experts, parts, hidden),
        "scale": torch.rand(top_k * parts),
        "threshold": torch.randn(top_k * parts).sort(descending=True).values,
        "map_in": torch.randn(map_rank(hidden, 1024, top_k), hidden) / 40,
        "map_out": torch.randn(hidden, map_rank(hidden, 1024, top_k)) / 40,
    }
    router, compiled = SubRouter.of(tensors, "silu"), torch.compile(route)
    kernel = re.compile(r"^\s+(?:cpp_fused\w*\(|extern_kernels\.|buf\d+ = torch\.ops\.aten\.)", re.MULTILINE)
    rows, kernels = [], 0
    for tokens in (1, 8, 64, 512):
        weights, chosen = torch.rand(tokens, experts).topk(top_k)
        active = torch.randint(1, top_k * parts + 1, (tokens,)).float()
        arguments = (router, torch.randn(tokens, hidden), weights, chosen, active, parts, "silu")
        with torch.inference_mode(), Operations() as operations:
            route(*arguments)
        torch._inductor.metrics.reset()
        with torch.inference_mode():
            _, code = run_and_get_code(compiled, *arguments)
        # Nothing is compiled, and there is no code, where a number of tokens is like the last.
        kernels = sum(len(kernel.findall(text)) for text in code[:1]) or kernels
        times = []
        for function in (route, compiled):
            with torch.inference_mode():
                for _ in range(3):
                    function(*arguments)
                spent = []
                for _ in range(30):
                    start = time.perf_counter()
                    function(*arguments)
                    spent.append(time.perf_counter() - start)
            times.append(f"{sorted(spent)[15] * 1e6:.0f}")
        rows.append([tokens, operations.count, kernels, *times])
    print(markdown(["tokens", "operations, eager", "kernels, compiled", "us, eager", "us, compiled"], rows))


def seconds_per_token(server: Server) -> float:
    """Of one request, alone."""
    start = time.perf_counter()
    server.tokens(PROMPTS[0], max_tokens=200)
    return (time.perf_counter() - start) / 200


def cost(python: Path, folder: Path) -> None:
    """What two-level routing costs where everything else costs nothing: in a model of 14.7M parameters."""
    routing_cost()
    rows = []
    for name, options in (("eager", [EAGER]), ("compiled", [])):
        speeds: dict[str, list[float]] = {"0": [], "1": []}
        # In turn, because a shared machine drifts; not at once, because two servers hold each other up.
        for _ in range(ROUNDS):
            for on, found in speeds.items():
                with serving(python, folder, *options, PRISM_VLLM=on) as server:
                    found.append(statistics.median(seconds_per_token(server) for _ in range(ROUNDS)))
        stock, ours = (statistics.median(found) for found in speeds.values())
        shares = [(own - other) / own for other, own in zip(*speeds.values(), strict=True)]
        span = f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"
        rows.append([name, f"{stock * 1e3:.2f}", f"{ours * 1e3:.2f}", span])
    print("\none request, milliseconds per token at full k\n")
    print(markdown(["", "stock router", "two-level router", "share of it in a step"], rows))


if __name__ == "__main__":
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / f".venv-vllm-{VERSION}", help="virtual environment of vLLM")
    parser.add_argument("--parts", default="quality,families,cost", help="which of the parts to run")
    parser.add_argument("--families", default=",".join(FAMILIES), help="which families")
    parser.add_argument("refactored_dir", type=Path, nargs="?", help="default: examples/olmoe-tiny, refactored")
    given = parser.parse_args()
    print_provenance()
    interpreter = prepare(given.venv.absolute())
    print(f"vllm-cpu {VERSION}, transformers {transformers.__version__}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as root:
        refactored = given.refactored_dir or Path(root) / "refactored"
        if not given.refactored_dir:
            prism_refactor.refactor(EXAMPLE, refactored)
        for part in given.parts.split(","):
            print(f"\n## {part}\n")
            if part == "families":
                families(interpreter, given.families.split(","))
            else:
                {"quality": quality, "cost": cost}[part](interpreter, refactored.absolute())
