"""The one exception hierarchy. Every error a user can cause is a `PrismError`; a command prints it as one line.

A message names an option by its Python name in backticks: "`sub_experts` 3: must be a power of two". Commands print the flag instead.
"""

import textwrap

LONGEST_LINE = 300


class PrismError(Exception):
    """Something the user can act on. The message names the file or option and the remedy; `exit_code` is the process's."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    """Return another library's error on one line, shortened where it is long; its type where it says nothing."""
    # What others have in backticks is no option of ours.
    return textwrap.shorten(str(error).replace("`", "'"), LONGEST_LINE) or type(error).__name__


class UsageError(PrismError):
    """An option has a value that cannot work."""

    exit_code = 2


class InputError(PrismError):
    """A checkpoint, dataset or folder is missing, broken or not supported."""

    exit_code = 3


class RequirementError(PrismError):
    """A verification failed, or a requirement does not hold."""

    exit_code = 4


class ResourceError(PrismError):
    """Not enough disk or memory."""

    exit_code = 5
