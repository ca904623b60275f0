"""Processes that run a refactoring's independent tasks: joblib's on this machine, or those of a Ray cluster."""

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import numpy as np
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import BrokenProcessPool

from prism_refactor.errors import ResourceError, UsageError, one_line

# Arrays of this many bytes travel together: joblib puts them into memory maps, which last until all the tasks that came with them are done.
CHUNK_BYTES = 2**28
# But no fewer tasks than these, for the workers wait for each other at the end of a chunk.
TASKS_PER_WORKER = 4
# A task is tried so many times before its workers' deaths end the run.
TRIALS = 3
ANSWER_SECONDS = 10
Task = tuple[Callable[..., Any], tuple[Any, ...]]


class Workers:
    """Runs tasks side by side, each on one thread; results do not depend on how many there are, or where.

        with Workers(2) as workers:
            for result in workers.run((solvers.solve, (saliency, 4, 1)) for saliency in layer): ...

    Large arrays are shared by memory map on this machine and through the object store of a cluster, not pickled. A worker that dies (killed
    for lack of memory, a lost node) is replaced and its tasks are run again.

    Args:
        count: processes; None: one per core of the cluster ('ray' only).
        engine: 'local' or 'ray'.
        address: of the Ray cluster; None: the one in RAY_ADDRESS, or one started here for the time being.

    Raises:
        UsageError: Ray is not installed, or the cluster has fewer cores than `count`.
        ResourceError: the cluster does not answer; or, while tasks run, workers die again and again.
    """

    def __init__(self, count: int | None = 1, engine: str = "local", address: str | None = None):
        self.count, self.engine, self.address = count, engine, address
        if engine == "ray" and find_spec("ray") is None:
            raise UsageError("`engine` ray needs Ray; install prism-refactor[ray]")
        self._parallel: Any = None
        self._config: Any = None

    def __enter__(self) -> "Workers":
        if self.engine == "ray":
            self._connect()
        try:
            self._open()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        if self.engine == "ray":
            import ray  # noqa: PLC0415  (optional)

            ray.shutdown()
        elif error is not None:
            # Interrupted or failed: no worker process outlives the run.
            get_reusable_executor().shutdown(wait=True, kill_workers=True)

    def run(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """The tasks' results in order, each as soon as it and those before it are there; tasks are drawn a chunk at a time."""
        for chunk in self._chunks(tasks):
            done = deaths = 0
            while done < len(chunk):
                try:
                    for result in self._parallel(delayed(function)(*arguments) for function, arguments in chunk[done:]):
                        done += 1
                        yield result
                except self._deaths() as death:
                    deaths += 1
                    if deaths == TRIALS:
                        raise ResourceError(
                            f"a worker process died {TRIALS} times over the same tasks, most likely for lack of memory; lower `workers` "
                            f"or `tokens_per_expert` ({one_line(death)})"
                        ) from death
                    self._close()
                    self._open()

    def _chunks(self, tasks: Iterable[Task]) -> Iterator[list[Task]]:
        """Lists of tasks, enough of them to keep all workers busy; an array that several of them share does not count.

        Without workers nothing travels: a task at a time.
        """
        alone = self.count == 1 and self.engine == "local"
        least = 1 if alone else TASKS_PER_WORKER * self.cores
        chunk: list[Task] = []
        uses: Counter[int] = Counter()
        sizes: dict[int, int] = {}
        for task in tasks:
            chunk.append(task)
            arrays = {id(value): value.nbytes for value in task[1] if isinstance(value, np.ndarray)}
            sizes |= arrays
            uses.update(arrays.keys())
            if len(chunk) >= least and (alone or sum(sizes[key] for key, count in uses.items() if count == 1) >= CHUNK_BYTES):
                yield chunk
                chunk, uses, sizes = [], Counter(), {}
        if chunk:
            yield chunk

    @property
    def cores(self) -> int:
        """How many workers there are; of a cluster, once it is connected."""
        if self.count is not None:
            return self.count
        import ray  # noqa: PLC0415  (optional)

        return int(ray.cluster_resources()["CPU"])

    def _open(self) -> None:
        if self.engine == "ray":
            # Ray replaces an actor that dies, and runs again what it ran.
            again = {"max_restarts": TRIALS - 1, "max_task_retries": TRIALS - 1}
            self._config = parallel_config("ray", n_jobs=self.count or -1, ray_remote_args=again)
            self._config.__enter__()
        # Ray gives a list and nothing before it is whole.
        parallel = Parallel(return_as="list") if self.engine == "ray" else Parallel(n_jobs=self.count, return_as="generator")
        try:
            self._parallel = parallel.__enter__()
        except ValueError as error:
            raise UsageError(f"`workers` {self.count}: {one_line(error)}") from error

    def _close(self) -> None:
        if self._parallel is not None:
            parallel, self._parallel = self._parallel, None
            parallel.__exit__(None, None, None)
        if self._config is not None:
            self._config.__exit__(None, None, None)
            self._config = None

    def _connect(self) -> None:
        import ray  # noqa: PLC0415  (optional)
        from ray.util.joblib import register_ray  # noqa: PLC0415

        address = self.address or os.environ.get("RAY_ADDRESS", "")
        host, _, port = address.rpartition(":")
        try:
            if port.isdigit():
                # Ray itself tries for minutes.
                socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
            ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise ResourceError(f"`engine` ray: {address or 'here'} does not let us in: {one_line(error)}") from error
        register_ray()

    def _deaths(self) -> type[Exception]:
        """What joblib raises when a process of the pool is gone."""
        if self.engine == "local":
            return BrokenProcessPool
        from ray.exceptions import RayActorError  # noqa: PLC0415  (optional)

        return RayActorError
