"""Options that more than one command takes."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import click

from prism_refactor.calibration.settings import DEFAULT_SAMPLES, DENSE_SAMPLES, DTYPES, Calibration
from prism_refactor.errors import InputError, UsageError, one_line
from prism_refactor.offload.options import DIRECT, PREFETCHES, READS
from prism_refactor.offload.policies import POLICIES
from prism_refactor.resources import parse_size

Function = TypeVar("Function", bound=Callable[..., Any])


class OutputFile(click.Path):
    """A file to write, refused at once where that cannot work, before hours of work.

    Args:
        suffixes: what its name may end in; anything if none is given.
    """

    def __init__(self, *suffixes: str):
        super().__init__(path_type=Path, dir_okay=False)
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path, of a link what it leads to. Raises UsageError."""
        given = Path(os.fsdecode(super().convert(value, param, ctx)))
        said = f"{param.opts[0] if param else 'output'} {given}"
        if self.suffixes and given.suffix not in self.suffixes:
            raise UsageError(f"{said}: must end in {', '.join(self.suffixes[:-1])} or {self.suffixes[-1]}")
        try:
            path = given.resolve() if given.is_symlink() else given
            if path.exists() and not path.is_file():
                raise UsageError(f"{said}: is no regular file; choose another")
            if not path.parent.is_dir():
                raise UsageError(f"{said}: the folder does not exist; create it first")
            with TemporaryFile(dir=path.parent):
                return path
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UsageError(f"{said}: cannot be written ({reason}); choose another") from None


class Finite(click.FloatRange):
    """A range of numbers without infinity and what is no number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; click's error otherwise."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Size(click.ParamType):
    """A number of bytes such as 5GB or 512MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, as an int."""
        size = parse_size(str(value))
        if size is None:
            self.fail(f"{value!r} is not a size; write 5GB or 512MiB", param, ctx)
        return size


class Share(click.ParamType):
    """A share such as 25% or 0.25, above 0 and at most 1."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share, as a float."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            self.fail(f"{value!r} is no share above 0 and at most 1; write 25% or 0.25", param, ctx)
        return share


class InputFolder(click.Path):
    """A folder that must be there.

    Args:
        remedy: what to do where it is not.
    """

    def __init__(self, remedy: str) -> None:
        super().__init__(path_type=Path, file_okay=False)
        self.remedy = remedy

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path. Raises InputError: a missing folder is an input that cannot be used."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; {self.remedy}")
        return path


class Requirements:
    """The option --require of a command, and the options that it replaced.

    Args:
        former: the former option, which is refused with the new spelling.
        advice: what to write instead of it.
        help_text: of --require.
    """

    def __init__(self, former: str, advice: str, help_text: str):
        self.former, self.advice, self.help_text = former, advice, help_text

    def __call__(self, function: Function) -> Function:
        """Add both options."""

        def refuse(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> None:
            if given:
                raise UsageError(f"{self.former} is now --require, with a condition that must hold; {self.advice}")

        old = click.option(self.former, multiple=True, hidden=True, expose_value=False, callback=refuse)
        new = click.option("--require", multiple=True, metavar="CONDITION", help=self.help_text)
        return new(old(function))


INPUT_FOLDER = InputFolder("give a local folder with config.json and safetensors shards")
STATS_FOLDER = InputFolder("make one with prism-profile")
OUTPUT_FOLDER = click.Path(path_type=Path, file_okay=False)
PICTURE = OutputFile(".png", ".svg", ".pdf")

TEXT_OPTIONS = (
    click.option(
        "--dataset",
        "datasets",
        multiple=True,
        metavar="NAME[SUBSET](SPLIT):SAMPLES",
        help="Text: a .jsonl, .json, .csv, .txt or .parquet file, a folder, or a Hub dataset; repeat for a mix.  [default: bundled text]",
    ),
    click.option("--text-column", default=Calibration.text_column, help="Column of --dataset that holds text or chats."),
    click.option("--max-seq-length", type=click.IntRange(2), help="Tokens per sample.  [default: 512, or what the model takes]"),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default=Calibration.device, help="Where layers run."),
    click.option("--batch-size", type=click.IntRange(1), default=Calibration.batch_size, help="Samples per forward pass."),
    click.option("--seed", type=click.IntRange(0), default=Calibration.seed, help="Equal seeds give equal bytes."),
)
CALIBRATION_OPTIONS = (
    *TEXT_OPTIONS[:2],
    click.option(
        "--num-samples",
        type=click.IntRange(1),
        help=f"Samples of calibration text.  [default: {DEFAULT_SAMPLES}, for a dense model {DENSE_SAMPLES}]",
    ),
    TEXT_OPTIONS[2],
    click.option(
        "--tokens-per-expert",
        type=click.IntRange(16, 65535),
        default=Calibration.tokens_per_expert,
        help="Activations kept per expert for the partitioner.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", *DTYPES]),
        default=Calibration.dtype,
        help="Compute type; auto is float32 on a CPU, the checkpoint's type on a GPU.",
    ),
    *TEXT_OPTIONS[3:],
)
SERVING_OPTIONS = (
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where the model runs."),
    click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", help="Type of the weights; auto is the checkpoint's."),
    click.option("--max-batch-tokens", type=click.IntRange(16), default=512, help="Tokens of one step."),
    click.option("--max-requests", type=click.IntRange(1), default=64, help="Requests that run at a time."),
)
OFFLOAD_OPTIONS = (
    click.option("--policy", type=click.Choice(list(POLICIES)), default="activation", help="Which sub-expert leaves fast memory."),
    click.option("--prefetch", type=click.Choice(PREFETCHES), default="none", help="How to predict which sub-experts to load early."),
    click.option(
        "--read",
        type=click.Choice(READS),
        default=DIRECT,
        help="direct: past the page cache; buffered: through it; pinned: all in page-locked host memory, for --device cuda.",
    ),
)
CALIBRATION_NAMES = ("datasets", "text_column", "num_samples", "max_seq_length", "tokens_per_expert", "dtype", "device", "batch_size")


def add(options: tuple[Callable[[Function], Function], ...]) -> Callable[[Function], Function]:
    """Apply click options in the order in which `--help` should list them."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
