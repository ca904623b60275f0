"""Run token rows through a checkpoint one decoder layer at a time: layers outside, batches inside."""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prism_refactor.models.architectures import dotted
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.layered import LayeredModel
from prism_refactor.models.transformers_models import named_arguments

# Hidden states that together need more than this are kept in an unnamed temporary file instead of in memory.
MEMORY_LIMIT = 2**30


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, states: int) -> torch.Tensor:
    """Room for one of several versions of the hidden states."""
    size = math.prod(shape) * dtype.itemsize
    if states == 1 or size * states <= MEMORY_LIMIT:
        return torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=(size,))).view(dtype).view(shape)


@dataclass(frozen=True)
class ComputeOptions:
    """How a model runs layer by layer.

    Attributes:
        dtype: compute type.
        device: 'cpu' or 'cuda'.
        batch_size: token sequences per forward.
    """

    dtype: torch.dtype
    device: str = "cpu"
    batch_size: int = 8


def _moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


class _LayersReached(Exception):
    """Raised by the last decoder layer's stand-in: everything before the layers has run."""


class LayerStream:
    """The hidden states of some token rows on their way through a model of which one layer is in memory.

    Everything outside the decoder layers (embedding, masks, rotary tables) is computed by the model's own forward, whose layers are
    stood in for while it runs; so what a layer receives is what transformers gives it.

    Args:
        checkpoint: the model.
        rows: int64 [S, T] token ids, no padding.
        compute: how to run.
        states: how many versions of the hidden states travel, for example one per number of active sub-experts.

    Attributes:
        states: of each version [S, T, H] in the compute type on the CPU: the hidden-state store, updated in place layer by layer. In some
            families there are more axes between T and H.
    """

    def __init__(self, checkpoint: Checkpoint, rows: torch.Tensor, compute: ComputeOptions, states: int = 1):
        self.layered = LayeredModel(checkpoint, compute.dtype, compute.device)
        self.layered.check()
        self.model = self.layered.model
        self.device, self.batch_size = compute.device, compute.batch_size
        self._hidden_size: int = checkpoint.text_config.hidden_size
        self.states: list[torch.Tensor] = []
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        # What layers give the next one beside the hidden states, by the name of its argument: of each version and batch.
        self._carried_names, self._token_names = checkpoint.architecture.carried, checkpoint.architecture.tokens
        self._rows = rows
        self._carried: dict[tuple[int, int], dict[str, Any]] = {}
        self._embed(rows, compute.dtype, states)

    @property
    def hidden(self) -> torch.Tensor:
        """The first version of the hidden states."""
        return self.states[0]

    def __len__(self) -> int:
        """Number of decoder layers."""
        return len(self.layered.layers)

    def _batches(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self.batch_size):
            yield slice(start, min(start + self.batch_size, rows))

    def _as_output(self, hidden: torch.Tensor) -> Any:
        """What a layer gives, without what it carries to the next."""
        return (hidden, *(None for _ in self._carried_names)) if self._carried_names else hidden

    def _embed(self, rows: torch.Tensor, dtype: torch.dtype, states: int) -> None:
        """Fill the store with the first layer's input and note, once per batch size, what else every layer is given."""
        name = next(name for name, module in self.model.named_modules() if module is self.model.get_input_embeddings())
        for module in self.model.modules():
            for leaf, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(self.device)
        with self.layered.loaded(name, *self._decoder_tensors()):
            for batch in self._batches(len(rows)):
                received = self._received(rows[batch])
                if not self.states:
                    shape = (len(rows), *received[0][0].shape[1:])
                    self.states = [_allocate(shape, dtype, states) for _ in range(states)]
                for state in self.states:
                    state[batch] = received[0][0].cpu()
                self._arguments.setdefault(batch.stop - batch.start, [arguments for _, arguments in received])

    @property
    def _decoder_name(self) -> str:
        return self.layered.layer_name(0).rpartition("layers.")[0].rstrip(".")

    @property
    def _decoder(self) -> nn.Module:
        """The module that holds the layers."""
        return self.model.get_submodule(self._decoder_name)

    def _decoder_tensors(self) -> list[str]:
        """Names of the tensors that it holds itself and the checkpoint has."""
        names = [name for name, _ in [*self._decoder.named_parameters(recurse=False), *self._decoder.named_buffers(recurse=False)]]
        return [own for name in names if self.layered.tensors_under(own := dotted(self._decoder_name, name))]

    @torch.inference_mode()
    def _received(self, rows: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """What every decoder layer is given when none changes anything: (hidden states, named arguments)."""
        received: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def stand_in(hidden: torch.Tensor, *given: Any, **named: Any) -> Any:
            received.append((hidden, named_arguments(self.layered.layers[len(received)], given, named)))
            if len(received) == len(self.layered.layers):
                raise _LayersReached
            return self._as_output(hidden)

        with self._layers_as(stand_in), suppress(_LayersReached):
            self.model.base_model(input_ids=rows.to(self.device), use_cache=False)
        return received

    @contextmanager
    def _layers_as(self, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Let something else stand in for every decoder layer for a while."""
        for layer in self.layered.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self.layered.layers:
                del layer.forward

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Materialise one decoder layer for the duration of a `with` block."""
        with self.layered.loaded(self.layered.layer_name(index)):
            yield self.layered.layers[index]

    @torch.inference_mode()
    def advance(self, index: int, on_batch: Callable[[int], None] | None = None, state: int = 0) -> None:
        """Send every row of one version through layer `index`, which must be materialised; `on_batch` is told the rows done."""
        layer, hidden = self.layered.layers[index], self.states[state]
        for batch in self._batches(len(hidden)):
            carried = {name: _moved(value, self.device) for name, value in self._carried.get((state, batch.start), {}).items()}
            tokens = {name: self._rows[batch].to(self.device) for name in self._token_names}
            arguments = self._arguments[batch.stop - batch.start][index] | carried | tokens
            output = layer(hidden[batch].to(self.device), **arguments)
            if self._carried_names:
                output, *others = output
                given_on = zip(self._carried_names, others, strict=True)
                self._carried[state, batch.start] = {name: _moved(other, "cpu") for name, other in given_on if name}
            hidden[batch] = output.cpu()
            if on_batch:
                on_batch(batch.stop)

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Materialise everything outside the layers; gives hidden states [T, H] -> logits [T, V] by the model's own forward.

        What a family does to logits (granitemoe divides them) is done; its layers are stood in for.
        """
        output = self.model.get_output_embeddings()
        parts = [name for name, module in self.model.named_modules() if module is output]
        others = [name for name, module in self._decoder.named_children() if module is not self.layered.layers]
        parts += [*(dotted(self._decoder_name, name) for name in others), *self._decoder_tensors()]
        owned = [part for part in parts if self.layered.tensors_under(part)]
        with self.layered.loaded(*owned):
            self.model.tie_weights()

            def logits(hidden: torch.Tensor) -> torch.Tensor:
                with self._layers_as(lambda *_, **__: self._as_output(hidden[None])):
                    # Their place is taken by the layers' output.
                    embedded = hidden.new_zeros(1, len(hidden), self._hidden_size)
                    return self.model(inputs_embeds=embedded, use_cache=False).logits[0]

            try:
                yield logits
            finally:
                output.to("meta")
