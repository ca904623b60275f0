"""Plain text tables."""

from typing import Any


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A plain text table, numbers to the right."""
    cells = [header, *[[str(value) for value in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join("  ".join(value.rjust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in cells)
