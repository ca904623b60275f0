"""A server in this process, and what asks it."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace

import torch
import uvicorn
from transformers import AutoTokenizer

from prism_refactor.models.loading import load
from prism_refactor.server.application import ServerState, create_app
from prism_refactor.server.metrics import Metrics
from prism_refactor.server.quality import QualityCurve
from prism_refactor.serving.engine import Engine, run_in_thread
from prism_refactor.serving.scheduling import Limits

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TEXT = "The river runs through the old town and"
LIMITS = Limits(tokens=128, requests=16)


@contextmanager
def served(folder, ends=(), **options):
    """A server in this process: its site and URL."""
    metrics = Metrics()
    engine = run_in_thread(
        lambda: Engine(load(folder, dtype=torch.float32), "per-token", replace(LIMITS, waiting=600), on_step=metrics.on_step, ends=ends)
    )
    metrics.watch(engine)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    curve = QualityCurve({4: 20.0, 8: 12.5, 12: 10.5, 16: 10.0})
    site = ServerState("tiny", engine, tokenizer, metrics, curve, **{"most_bytes": 1 << 20} | options)
    engine.start()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = uvicorn.Server(uvicorn.Config(create_app(site, engine.stop), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield site, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        engine.close()


def fetch(url, body=None, headers=None, raw=False, method=None):
    """Status, JSON body (or bytes) and headers of an answer."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            content = response.read()
            return response.status, content if raw else json.loads(content), response.headers
    except urllib.error.HTTPError as error:
        content = error.read()
        return error.code, content if raw else json.loads(content), error.headers


def idle(site, seconds=30):
    """Wait until nothing runs; then no KV block may be held."""
    until = time.monotonic() + seconds
    while (site.engine.running or site.engine.waiting) and time.monotonic() < until:
        time.sleep(0.02)
    return (site.engine.running, site.engine.waiting, site.engine.kv_in_use) == (0, [], 0)
