"""`prism-serve`: an OpenAI-compatible server where every request has its own k."""

import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_refactor.calibration.settings import torch_dtype
from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import INPUT_FOLDER, OFFLOAD_OPTIONS, SERVING_OPTIONS, Finite, add
from prism_refactor.errors import InputError, UsageError, one_line
from prism_refactor.formats import PrismConfig
from prism_refactor.offload.options import CacheBudget
from prism_refactor.serving.scheduling import SCHEDULERS, Limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from prism_refactor.server.metrics import Metrics
    from prism_refactor.serving.engine import Engine


@command()
@click.argument("refactored_dir", type=INPUT_FOLDER)
@add(SERVING_OPTIONS)
@click.option("--scheduler", type=click.Choice(list(SCHEDULERS)), default="per-token", help="Which requests share a step, and at which k.")
@click.option(
    "--max-wait",
    type=Finite(0),
    default=Limits.wait,
    help="Longest time, in seconds, that a request may be delayed to form a better batch (not by fifo and per-token).",
)
@click.option("--kv-tokens", type=click.IntRange(64), help="Tokens of the KV cache.  [default: a quarter of free memory]")
@click.option("--max-waiting", type=click.IntRange(0), default=256, help="Requests that may queue; more get 429.")
@click.option("--fast-memory", help="Keep only so much of the sub-experts in memory: bytes (2GiB) or a share (25%).  [default: all]")
@add(OFFLOAD_OPTIONS)
@click.option("--served-model-name", help="Name of the model for clients.  [default: the folder's]")
@click.option("--chat-template", type=click.Path(path_type=Path, dir_okay=False), help="Jinja file, where the tokenizer has no template.")
@click.option("--api-key", envvar="PRISM_API_KEY", help="Required of clients; better set PRISM_API_KEY.", show_envvar=True)
@click.option("--max-body-bytes", type=click.IntRange(1), help="Longest text of a request; longer ones get 413.  [default: 4 MiB]")
@click.option("--allow-origin", "origins", multiple=True, help="Web page that may ask this server from a browser; '*' for all; repeat.")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0: any free one.")
@click.option("--drain-seconds", type=click.IntRange(0), default=30, help="What running requests get after SIGTERM or Ctrl-C.")
def main(reporter: Reporter, refactored_dir: Path, **options: Any) -> None:
    """Serve the checkpoint in REFACTORED_DIR over HTTP as OpenAI does, every request at its own quality floor.

    A request says which share of the sub-experts its tokens may run on average, {"prism": {"budget": 0.25}}, or how many every token needs,
    {"prism": {"k": 12}}, or how good it must be, {"prism": {"quality": 0.97}} (after prism-eval --save), or asks for the model NAME@25% or
    NAME@12. It is served at that, whatever runs beside it. SIGTERM stops taking requests, lets the running ones end, and exits with 0.
    """
    from prism_refactor.models.loading import end_tokens
    from prism_refactor.server.application import MOST_BYTES, ServerState, UvicornServer
    from prism_refactor.server.metrics import Metrics
    from prism_refactor.server.quality import QualityCurve
    from prism_refactor.serving.engine import run_in_thread

    name = options["served_model_name"] or _name_of(refactored_dir.resolve())
    if "@" in name:
        raise UsageError(f"--served-model-name {name}: must have no @, which separates the name from k or a budget")
    tokenizer = _tokenizer(refactored_dir, options["chat_template"])
    listener = _listen(options["host"], options["port"])
    reporter.line(f"loading {refactored_dir}")
    metrics = Metrics()
    engine = run_in_thread(_engine, refactored_dir, metrics, end_tokens(tokenizer.eos_token_id), options)
    metrics.watch(engine)
    prism = PrismConfig.required(engine.model.config, refactored_dir)
    curve = QualityCurve.load(refactored_dir, prism.best_router, prism.max_active)
    key, most_bytes, origins = options["api_key"], options["max_body_bytes"] or MOST_BYTES, options["origins"]
    server = UvicornServer(ServerState(name, engine, tokenizer, metrics, curve, key, most_bytes, origins), options["drain_seconds"])
    # uvicorn drains on these, and then raises them again for whoever had them before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    engine.start()
    host, port = listener.getsockname()[:2]
    reporter.line(f"serving {name} at http://{host}:{port} ({options['scheduler']}, k = 1 to {engine.full_k})", host=host, port=port)
    server.run(sockets=[listener])
    left = engine.unfinished
    reporter.line("stopped" + (f"; {left} requests were ended" if left else ""), unfinished=left)


def _name_of(folder: Path) -> str:
    """A folder's name; of a snapshot in the Hub's cache, models--ORGANISATION--NAME/snapshots/HASH, the model's."""
    return folder.parents[1].name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name


def _engine(folder: Path, metrics: "Metrics", ends: list[int], options: dict[str, Any]) -> "Engine":
    from prism_refactor.serving.engine import Engine
    from prism_refactor.serving.performance import PerformanceModel

    requests, wait, waiting = options["max_requests"], options["max_wait"], options["max_waiting"]
    limits = Limits(options["max_batch_tokens"], requests, wait, options["kv_tokens"], waiting)
    return Engine(_model(folder, options), options["scheduler"], limits, PerformanceModel.load(folder), metrics.on_step, ends)


def _model(folder: Path, options: dict[str, Any]) -> Any:
    from prism_refactor.models.loading import load
    from prism_refactor.offload.manager import load_offloaded

    if options["fast_memory"] is None:
        return load(folder, options["device"], torch_dtype(options["dtype"]))
    if options["dtype"] != "auto":
        raise UsageError("--dtype: with --fast-memory sub-experts are used as they are stored; leave it out")
    budget = CacheBudget(options["fast_memory"])
    return load_offloaded(folder, budget, options["policy"], options["prefetch"], options["read"], options["device"])


def _tokenizer(folder: Path, template: Path | None) -> "PreTrainedTokenizerFast":
    from prism_refactor.calibration.text import load_tokenizer
    from prism_refactor.models.transformers_models import check_chat_template

    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: the tokenizer has no tokenizer.json, which streaming needs")
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text()
            check_chat_template(tokenizer.chat_template)
        except OSError as error:
            raise UsageError(f"--chat-template {template}: {error.strerror}") from None
        except Exception as error:
            raise UsageError(f"--chat-template {template}: is no template: {one_line(error)}") from None
    return tokenizer


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from None
