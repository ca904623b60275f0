import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import FAST, files
from test_commands import start

from prism_refactor.errors import ResourceError
from prism_refactor.refactoring.workers import TRIALS, Workers

# Long enough partitions that a worker can be killed in the middle of them.
SLOW = [*FAST[:6], "--solver", "genetic", "--quiet"]


def double(value):
    return 2 * value


def kind_of(array):
    return type(array).__name__, float(array.sum())


def die_once(value, marker):
    if value == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order(count):
    with Workers(count) as workers:
        assert list(workers.run((double, (value,)) for value in range(50))) == [2 * value for value in range(50)]


def test_large_arrays_are_shared_by_memory_map(monkeypatch):
    monkeypatch.setattr("prism_refactor.refactoring.workers.CHUNK_BYTES", 10_000_000)
    array = np.ones((1000, 1000), np.float32)
    with Workers(2) as workers:
        assert list(workers.run((kind_of, (array * value,)) for value in range(5))) == [("memmap", value * 1e6) for value in range(5)]


@pytest.mark.parametrize(("megabytes", "shared", "expected"), [(4, 100, [68, 32]), (4, 1000, [68, 32]), (100, 0, [8] * 12 + [4])])
def test_no_more_arrays_travel_at_once_than_a_chunk_holds_and_workers_need(megabytes, shared, expected):
    """One array that all tasks share, however large, does not part them; each worker has some tasks of a chunk."""
    shared = np.broadcast_to(np.float32(1), (shared * 250_000,))
    arrays = (np.broadcast_to(np.float32(value), (megabytes * 250_000,)) for value in range(100))
    assert [len(chunk) for chunk in Workers(2)._chunks((double, (array, shared)) for array in arrays)] == expected


@pytest.mark.long
def test_a_dead_worker_is_replaced_and_its_task_done_again(tmp_path):
    with Workers(2) as workers:
        assert list(workers.run((die_once, (value, tmp_path / "died")) for value in range(8))) == list(range(8))
        assert (tmp_path / "died").exists()
        assert list(workers.run([(double, (4,))])) == [8]


@pytest.mark.long
def test_workers_that_always_die_end_the_run():
    with pytest.raises(ResourceError, match=f"died {TRIALS} times.*`workers`"), Workers(2) as workers:
        list(workers.run([(die, (0,)), (die, (1,))]))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Address of a Ray cluster of this machine alone."""
    address = "127.0.0.1:46379"
    # Its sockets' paths must be short.
    folder = Path(f"/tmp/prism-ray-{os.getpid()}")
    options = ["--head", "--block", "--num-cpus=2", "--port=46379", "--include-dashboard=false", f"--temp-dir={folder}"]
    ray = Path(sys.executable).with_name("ray")
    # Without a token in the home folder of whoever runs the tests.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    head = subprocess.Popen([ray, "start", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while subprocess.run([ray, "health-check", "--address", address], capture_output=True, check=False).returncode:
        assert head.poll() is None
        time.sleep(0.5)
    yield address
    head.terminate()
    head.wait()
    del os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["RAY_AUTH_MODE"]
    subprocess.run(["rm", "-rf", folder], check=True)


def actors():
    return [process for process in psutil.process_iter(["cmdline"]) if "ray::PoolActor" in " ".join(process.info["cmdline"] or [])]


@pytest.mark.alone
@pytest.mark.long
def test_a_ray_cluster_that_loses_a_worker_gives_the_same_bytes(tmp_path, models, cluster):
    source = models["qwen2_moe"]
    process = start("prism-refactor", source, tmp_path / "ray", *SLOW, "--engine", "ray", "--ray-address", cluster)
    while not (working := [actor for actor in actors() if "run_batch" in actor.cmdline()[0]]):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    working[0].kill()
    assert process.wait() == 0, process.stderr.read()
    here = start("prism-refactor", source, tmp_path / "here", *SLOW, "--workers", "2")
    assert here.wait() == 0, here.stderr.read()
    assert files(tmp_path / "ray") == files(tmp_path / "here")


@pytest.mark.alone
@pytest.mark.long
def test_more_workers_than_the_cluster_has_cores_are_refused(tmp_path, models, cluster):
    process = start(
        "prism-refactor", models["olmoe"], tmp_path / "out", *SLOW, "--engine", "ray", "--ray-address", cluster, "--workers", "99"
    )
    assert process.wait() == 2
    assert "--workers 99" in process.stderr.read()


def test_a_ray_address_needs_the_engine(tmp_path, models, command):
    result = command("prism-refactor", models["olmoe"], tmp_path / "out", *FAST, "--ray-address", "auto")
    assert result.code == 2
    assert "--ray-address has no effect without --engine ray" in result.err


@pytest.mark.long
def test_a_cluster_that_does_not_answer_is_reported(tmp_path, models):
    process = start("prism-refactor", models["olmoe"], tmp_path / "out", *SLOW, "--engine", "ray", "--ray-address", "127.0.0.1:1")
    assert process.wait() == 5
    error = process.stderr.read()
    assert "127.0.0.1:1" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
