"""`prism-loadtest`: a trace of requests, against a server or against the performance model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import Finite
from prism_refactor.errors import InputError, UsageError
from prism_refactor.serving.scheduling import SCHEDULERS, Limits
from prism_refactor.signals import run_async
from prism_refactor.tables import table

# Who takes a request's k where: prism-serve, or vLLM with the plugin prism-vllm.
APIS = ("prism", "vllm")

if TYPE_CHECKING:
    from prism_refactor.formats import Arrival
    from prism_refactor.loadtest.workload import Served, Slo


@command()
@click.argument("target")
@click.option("--simulate", "simulated", is_flag=True, help="TARGET is a folder with performance.json; nothing is run.")
@click.option("--scheduler", type=click.Choice(list(SCHEDULERS)), multiple=True, help="With --simulate; repeat to compare.  [default: all]")
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Requests as JSON lines, see docs/serving.md.")
@click.option("--requests", type=click.IntRange(1), default=100, help="Requests of a made-up trace.")
@click.option("--rate", type=Finite(0, min_open=True), default=4.0, help="Its mean requests per second (Poisson).")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, help="Its mean length of a prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=32, help="Its mean tokens to generate.")
@click.option("--mix", metavar="K:WEIGHT,...", help="Its floors.  [default: normal around half of full k, the paper's]")
@click.option("--seed", type=click.IntRange(0), default=0, help="Equal seeds give equal traces.")
@click.option("--slo-ttft", type=Finite(0), help="Seconds to the first token that count as good.")
@click.option("--slo-tpot", type=Finite(0), help="Seconds per token after it that count as good.")
@click.option("--max-batch-tokens", type=click.IntRange(16), default=Limits.tokens, help="With --simulate: tokens of one step.")
@click.option("--max-requests", type=click.IntRange(1), default=Limits.requests, help="With --simulate: requests that run at a time.")
@click.option("--kv-tokens", type=click.IntRange(64), help="With --simulate: tokens of the KV cache.  [default: no bound]")
@click.option("--api", type=click.Choice(APIS), default="prism", help="How floors are sent: to prism-serve, or to vLLM with prism-vllm.")
@click.option("--model", help="Name of the model.  [default: the server's first]")
@click.option("--api-key", envvar="PRISM_API_KEY", help="That the server requires.", show_envvar=True)
@click.option("--timeout", type=Finite(0, min_open=True), default=600.0, help="Seconds after which an answer counts as lost.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(reporter: Reporter, target: str, simulated: bool, as_json: bool, **options: Any) -> None:
    """Replay requests of mixed floors against the server at TARGET, a URL, and print how it served them.

    With --simulate, TARGET is a checkpoint measured by prism-bench, and the schedulers are compared on its performance model alone:
    thousands of requests in seconds. Exit code 3 when no request was served.
    """
    from prism_refactor.loadtest.workload import Slo

    slo = Slo(options["slo_ttft"], options["slo_tpot"])
    if simulated:
        results = _simulated(target, options, slo)
    else:
        if options["scheduler"]:
            raise UsageError("--scheduler: a server has its own; use it with --simulate")
        results = {"server": run_async(_against_server(reporter, target, options, slo))}
    reporter.close()
    click.echo(json.dumps(results, indent=2) if as_json else describe(results))
    if not any(result["done"] for result in results.values()):
        raise InputError(f"{target}: served no request")


def _trace(full_k: int | None, options: dict[str, Any]) -> list["Arrival"]:
    from prism_refactor.loadtest.workload import floors, poisson, read_trace

    if options["trace"] is not None:
        return read_trace(options["trace"])
    try:
        # A server that knows no k gets requests without one; vLLM does not say which it takes.
        mix = floors(None if options["api"] == "vllm" else full_k or 1, options["mix"])
    except ValueError as error:
        raise UsageError(f"--mix {options['mix'] or 'is missing'}: {error}") from None
    sizes = options["prompt_tokens"], options["max_tokens"]
    return poisson(options["requests"], options["rate"], sizes, mix, options["seed"])


def _simulated(folder: str, options: dict[str, Any], slo: "Slo") -> dict[str, dict[str, Any]]:
    from prism_refactor.loadtest.simulator import simulate
    from prism_refactor.serving.performance import PerformanceModel

    performance = PerformanceModel.load(Path(folder))
    if performance is None:
        raise InputError(f"{folder}: has no performance model; run prism-bench first")
    trace = _trace(performance.full_k, options)
    most = max(arrival.k or 1 for arrival in trace)
    if most > performance.full_k:
        raise InputError(f"the trace asks for k = {most}; the model has {performance.full_k}")
    limits = Limits(options["max_batch_tokens"], options["max_requests"], kv_tokens=options["kv_tokens"])
    results = {}
    for scheduler in options["scheduler"] or SCHEDULERS:
        served, seconds = simulate(trace, scheduler, performance, limits)
        results[scheduler] = _summary(served, seconds, trace, slo)
    return results


async def _against_server(reporter: Reporter, url: str, options: dict[str, Any], slo: "Slo") -> dict[str, Any]:
    from prism_refactor.loadtest.client import discover, run_load

    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url}: is no URL; to use a folder's performance model give --simulate")
    server = await discover(url.rstrip("/").removesuffix("/v1"), options["model"], options["api_key"], options["api"])
    trace = _trace(server.full_k, options)
    served, seconds = await run_load(server, trace, options["seed"], options["timeout"], reporter)
    return _summary(served, seconds, trace, slo)


def _summary(served: list["Served"], seconds: float, trace: list["Arrival"], slo: "Slo") -> dict[str, Any]:
    from prism_refactor.loadtest.workload import summary

    prompts = sum(arrival.prompt_tokens for arrival, item in zip(trace, served, strict=True) if item.done is not None)
    return summary(served, seconds, prompts, slo)


def describe(results: dict[str, dict[str, Any]]) -> str:
    """A table with a row for each system; times in seconds."""
    header = ["", "done", "tokens/s", "generated/s", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "e2e p50", "p90", "p99"]
    header += ["good", "k asked", "served"]
    rows = []
    for name, result in results.items():
        times = [f"{result[kind].get(share, float('nan')):.3g}" for kind in ("ttft", "tpot", "e2e") for share in ("p50", "p90", "p99")]
        ks = [f"{result[kind] or 0:.2f}" for kind in ("mean_asked_k", "mean_served_k")]
        speeds = [f"{result[kind]:.1f}" for kind in ("tokens_per_second", "generated_tokens_per_second")]
        rows.append([name, f"{result['done']}/{result['requests']}", *speeds, *times, f"{result['goodput_share']:.0%}", *ks])
    lines = [table(header, rows)]
    for name, result in results.items():
        lines += [f"{name}: {number} requests were not served: {error}" for error, number in result["errors"].items()]
        if result["below_floor"]:
            lines.append(f"{name}: {result['below_floor']} requests were served below their floor")
    return "\n".join(lines)
