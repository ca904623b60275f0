"""The one exception hierarchy. Every error a user can cause is a `PrismError`; the door prints it as one line."""

import textwrap

LONGEST_LINE = 300


class PrismError(Exception):
    """Something the user can act on. The message names the file or option and the remedy; `exit_code` is the process's."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    """Another library's error on one line, cut where it goes on and on, or its type where it says nothing."""
    return textwrap.shorten(str(error), LONGEST_LINE) or type(error).__name__


class UsageError(PrismError):
    """An option has a value that cannot work."""

    exit_code = 2


class InputError(PrismError):
    """A checkpoint, dataset or folder is missing, broken or not supported."""

    exit_code = 3


class GateError(PrismError):
    """A verification or quality gate was not met."""

    exit_code = 4


class ResourceError(PrismError):
    """Not enough disk or memory."""

    exit_code = 5
