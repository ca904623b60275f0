"""Rounds of 500 clients at once against prism-serve: answers, disconnects, broken and oversized bodies; then SIGTERM under load.

    python benchmarks/soak.py [REFACTORED_DIR] [--rounds N] [--clients N]

Without REFACTORED_DIR refactors examples/olmoe-tiny quickly. Of the clients 60 % wait for their answer, 25 % leave in the middle of it,
10 % send a body that is no request, 5 % a prompt that does not fit. Every whole answer is compared with the one that the same request got
alone before the first round. After each round: the server's resident memory, its threads, and the KV blocks still held. In the end 100
clients are in the middle of their answers when the server is told to stop; all of them must get the rest.
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from common import EXAMPLE, markdown, print_provenance

BIN = Path(sys.executable).parent
PROMPTS = ("The history of the city begins in the", "In mathematics, a group is a set", "def read(path):", "She opened the door")
KS = (2, 6, 11, 16)
BROKEN = (
    b"",
    b"{",
    b"[1, 2]",
    b'{"model": "soak"}',
    b'{"model": "soak", "prompt": 5}',
    b'{"model": "soak", "prompt": "x", "prism": {"k": "a"}}',
)


def request(prompt: str, k: int, tokens: int) -> dict[str, Any]:
    options = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    return {"model": "soak", "prompt": prompt, "prism": {"k": k}, "max_tokens": tokens, **options}


async def read(response: aiohttp.ClientResponse, leave_after: int | None = None) -> tuple[str, bool]:
    """The text of a stream, and whether it came to its end mark exactly once."""
    text, ends, seen = "", 0, 0
    async for line in response.content:
        if line.strip() == b"data: [DONE]":
            ends += 1
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            text += "".join(choice["text"] for choice in event.get("choices", []))
            seen += 1
            if leave_after is not None and seen > leave_after:
                response.close()
                break
    return text, ends == 1


async def crowd(url: str, clients: int, dice: random.Random, expected: dict[tuple[str, int], str], tokens: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()

    async def one(session: aiohttp.ClientSession, kind: float) -> None:
        prompt, k = dice.choice(PROMPTS), dice.choice(KS)
        address = f"{url}/v1/completions"
        if kind < 0.10:
            async with session.post(address, data=dice.choice(BROKEN), headers={"Content-Type": "application/json"}) as response:
                outcomes["broken body: 400" if response.status == 400 else f"broken body: {response.status}"] += 1
        elif kind < 0.15:
            async with session.post(address, json=request("word " * 5000, k, 5)) as response:
                outcomes["oversized: 400" if response.status == 400 else f"oversized: {response.status}"] += 1
        elif kind < 0.40:
            async with session.post(address, json=request(prompt, k, 200)) as response:
                await read(response, leave_after=dice.randrange(8))
                outcomes["left"] += 1
        else:
            async with session.post(address, json=request(prompt, k, tokens)) as response:
                text, ended = await read(response)
                outcomes["right answer" if ended and text == expected[prompt, k] else f"WRONG: status {response.status}"] += 1

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=500)) as session:
        await asyncio.gather(*(one(session, dice.random()) for _ in range(clients)))
    return outcomes


async def alone(url: str, tokens: int) -> dict[tuple[str, int], str]:
    expected = {}
    async with aiohttp.ClientSession() as session:
        for prompt in PROMPTS:
            for k in KS:
                async with session.post(f"{url}/v1/completions", json=request(prompt, k, tokens)) as response:
                    expected[prompt, k] = (await read(response))[0]
    return expected


async def gauge(url: str, name: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


async def settled(url: str) -> float:
    """KV blocks held when nothing runs or waits any more."""
    while await gauge(url, "prism_requests_running") or await gauge(url, "prism_requests_waiting"):
        await asyncio.sleep(0.1)
    return await gauge(url, "prism_kv_blocks_in_use")


async def terminated(url: str, server: subprocess.Popen, expected: dict[tuple[str, int], str], tokens: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    started = asyncio.Semaphore(0)

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        prompt, k = PROMPTS[number % len(PROMPTS)], KS[number // len(PROMPTS) % len(KS)]
        async with session.post(f"{url}/v1/completions", json=request(prompt, k, tokens)) as response:
            started.release()
            text, ended = await read(response)
            outcomes["right answer" if ended and text == expected[prompt, k] else "LOST"] += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)) as session:
        tasks = [asyncio.create_task(one(session, number)) for number in range(100)]
        for _ in tasks:
            await started.acquire()
        server.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("refactored", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    print_provenance()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.refactored or Path(scratch) / "refactored"
        if arguments.refactored is None:
            options = ["--solver", "ascent", "--num-samples", "16", "--quiet"]
            subprocess.run([BIN / "prism-refactor", EXAMPLE, folder, *options], check=True, stdout=subprocess.DEVNULL)
        options = ["--port", "0", "--log-json", "--served-model-name", "soak", "--max-waiting", "1000", "--drain-seconds", "120"]
        server = subprocess.Popen([BIN / "prism-serve", folder, *options, "--dtype", "float32"], stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        event: dict[str, Any] = {}
        while "port" not in event:
            event = json.loads(server.stderr.readline())
        url = f"http://127.0.0.1:{event['port']}"
        process, dice = psutil.Process(server.pid), random.Random(0)
        expected = asyncio.run(alone(url, arguments.tokens))
        rows = []
        for number in range(arguments.rounds):
            start = time.monotonic()
            outcomes = asyncio.run(crowd(url, arguments.clients, dice, expected, arguments.tokens))
            seconds = time.monotonic() - start
            blocks = asyncio.run(settled(url))
            memory = process.memory_info().rss / 2**20
            said = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
            rows.append([number + 1, f"{seconds:.0f}", said, f"{blocks:.0f}", f"{memory:.0f}", process.num_threads()])
        print(markdown(["round", "s", "clients", "KV blocks held after it", "resident MiB", "threads"], rows) + "\n")
        outcomes = asyncio.run(terminated(url, server, expected, arguments.tokens))
        last = json.loads(server.stderr.read().splitlines()[-1])
        print(
            f"SIGTERM with 100 answers under way: {dict(outcomes)}, ended by the server {last['unfinished']}, exit code {server.wait(60)}"
        )


if __name__ == "__main__":
    main()
