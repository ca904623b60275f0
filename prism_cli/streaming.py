"""What `prism-run` prints while it generates."""

import time
from typing import Any

import click
import torch
from transformers import TextStreamer


class Clock(TextStreamer):
    """Prints the text as it comes, unless it is to be quiet, and notes when each token came."""

    def __init__(self, tokenizer: Any, quiet: bool):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.quiet = quiet
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note when a token comes."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is sure."""
        if not self.quiet:
            click.echo(text, nl=stream_end)
