"""Signals that end a command: that one came, and where it must not take effect. Below everything, as `errors`.

A signal raises KeyboardInterrupt or SystemExit wherever Python happens to be. In a destructor that is lost; in another library's C code
it may come out as an error of its own, a ValueError of torch's for one. So it is also noted.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

INTERRUPTED, TERMINATED = 130, 143
_STOPS = (signal.SIGINT, signal.SIGTERM)
_came: list[int] = []
Result = TypeVar("Result")


def listen() -> None:
    """From now on note SIGINT and SIGTERM, and raise KeyboardInterrupt and SystemExit; but what the caller ignores, as shells do with the
    interrupt for a command in their background, stays ignored.
    """
    for number in _STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, _: Any) -> None:
    _came.append(INTERRUPTED if number == signal.SIGINT else TERMINATED)
    raise_again()


def raise_again() -> None:
    """Raise what the first signal raised, if one came: whoever was to get it may have lost it."""
    if _came:
        raise KeyboardInterrupt if _came[0] == INTERRUPTED else SystemExit(TERMINATED)


def exit_code(error: BaseException) -> int | None:
    """The exit code of a command that ends with an error because a signal came; None: it ends for the error's own sake."""
    if _came:
        return _came[0]
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else TERMINATED if isinstance(error, SystemExit) else None


@contextmanager
def uninterrupted(then: Callable[[], None] | None = None) -> Iterator[None]:
    """Signals that come in this block take effect when it has ended; `then` is called when one comes."""
    came: list[int] = []
    held: dict[signal.Signals, Any] = {}
    ended = False

    def hold(number: int, frame: Any) -> None:
        if ended:
            # The block's end was itself interrupted, before this signal had its handler again.
            held[signal.Signals(number)](number, frame)
        came.append(number)
        if then is not None:
            then()

    try:
        # Handlers run in the main thread only, and only there can they be changed.
        for number in _STOPS if threading.current_thread() is threading.main_thread() else ():
            handler = signal.getsignal(number)
            if callable(handler):
                held[number] = handler
                signal.signal(number, hold)
        yield
    finally:
        ended = True
        for number, handler in held.items():
            signal.signal(number, handler)
        for signalled in came:
            signal.raise_signal(signalled)


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run`, cancelled by a signal that then takes effect; it would otherwise strike in the middle of any task, or of the loop."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def noted() -> Result:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        return await work

    def cancel() -> None:
        for loop, task in running:
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

    with uninterrupted(cancel):
        return asyncio.run(noted())
