"""Evaluation text as overlapping windows, each of whose tokens is scored once."""

import itertools
from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch

from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.sources import Source
from prism_refactor.calibration.text import EVALUATION_TEXT, check_tokens, load_tokenizer, token_pieces
from prism_refactor.errors import InputError, UsageError
from prism_refactor.models.checkpoint import Checkpoint

# Tokens of the text of which it is told how many sub-experts each runs.
SAMPLE = 48


@dataclass(frozen=True)
class Windows:
    """Rows of tokens and which of them are scored (see `read_windows`).

    Attributes:
        rows: int64 [S, T] token ids.
        scored: bool [S, T]: the tokens whose prediction counts; never the first of a row.
        domains: the domain of each row.
        stride: tokens from one window to the next.
        sample: the first tokens of `sample_row`, each as text.
    """

    rows: torch.Tensor
    scored: torch.Tensor
    domains: list[str]
    stride: int
    sample: list[str] = field(default_factory=list)

    @property
    def sample_row(self) -> int:
        """The row in the middle of those that are scored: the first ones are often a page's head."""
        rows = self.scored.any(1).nonzero().flatten()
        return int(rows[len(rows) // 2])

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return int(self.scored.sum())


def read_windows(calibration: Calibration, checkpoint: Checkpoint, stride: int | None = None, most: int | None = None) -> Windows:
    """Strided windows, as transformers' documentation defines the perplexity of fixed-length models.

    The documents of a domain (the records' `domain` field, where there is one) are joined by the end-of-text token and covered by
    windows of `length` tokens that start `stride` apart; a window scores what the one before it did not see. The last window of a
    domain is moved back to be full; a domain shorter than one window is padded behind its end, where padding changes nothing.

    Args:
        calibration: which text (no dataset: the bundled text for evaluation; counts of samples are not used), tokens per window, and the
            seed of the shuffle of the documents, which decides what is left out when there are more than `most` tokens.
        checkpoint: whose tokenizer is used.
        stride: tokens from one window to the next, at most a window; None: half a window.
        most: stop reading at this many tokens.

    Raises:
        InputError: unreadable, or no text.
        UsageError: the stride is longer than the window.
    """
    length = calibration.sequence_length(checkpoint)
    stride = stride or max(1, length // 2)
    if stride > length:
        raise UsageError(f"`stride` {stride}: must be at most the window of {length} tokens")
    tokenizer = load_tokenizer(checkpoint.path)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    datasets = list(calibration.datasets) or [EVALUATION_TEXT]
    texts: dict[str, list[int]] = defaultdict(list)
    read = 0
    for name in datasets:
        if read == most:
            break
        for record in Source.parse(name).records(calibration.text_column, calibration.seed):
            ids: list[int] = []
            for piece in token_pieces(tokenizer, record[calibration.text_column]):
                ids += piece
                if most is not None and read + len(ids) >= most:
                    ids = ids[: most - read]
                    break
            if ids:
                texts[str(record.get("domain") or "text")] += ids + separator
            read += len(ids)
            if read == most:
                break
    rows, scored, domains = [], [], []
    for domain in sorted(texts):
        tokens = texts[domain][:-1] if separator else texts[domain]
        for row, counted in _windows(tokens, length, stride, (separator or [0])[0]):
            rows.append(row)
            scored.append(counted)
            domains.append(domain)
    if not any(any(row) for row in scored):
        raise InputError(f"`datasets` {', '.join(datasets)}: holds no text to score")
    check_tokens(checkpoint, tokenizer, max(map(max, rows)))
    found = Windows(torch.tensor(rows), torch.tensor(scored), domains, stride)
    # Without padding, which is not scored.
    end = int(found.scored[found.sample_row].nonzero().max()) + 1
    tokens = rows[found.sample_row][: min(end, SAMPLE)]
    # Of a token what it adds to the text: alone it may be half a character, or lack its space.
    prefixes = [tokenizer.decode(tokens[:count]).rstrip("\ufffd") for count in range(len(tokens) + 1)]
    return replace(found, sample=[text[len(before) :] for before, text in itertools.pairwise(prefixes)])


def _windows(tokens: list[int], length: int, stride: int, padding: int) -> list[tuple[list[int], list[bool]]]:
    """(row, scored) of each window."""
    found: list[tuple[list[int], list[bool]]] = []
    # The first token of the text has nothing to be predicted from; later windows overlap by at least the one token that is.
    seen, step = 1, min(stride, length - 1)
    while seen < len(tokens) or not found:
        end = min(length if not found else seen + step, len(tokens))
        start = max(0, end - length)
        missing = length - (end - start)
        row = tokens[start:end] + [padding] * missing
        found.append((row, [seen <= position < end for position in range(start, end)] + [False] * missing))
        seen = end
    return found
