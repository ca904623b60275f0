"""Run a command on a stand-in for a GPU: python tests/accelerator.py prism-refactor ARGUMENTS...

The stand-in's tensors say that they are on the device 'standin', hold their numbers in a CPU tensor, and refuse to be mixed with tensors
of the CPU as CUDA's would: what forgets to move a tensor fails here too. It is not fast, has no memory of its own and no kernels of its
own, so it shows neither speed nor rounding of a GPU.
"""

import sys
from typing import Any

import torch

# Views of wrapper subclasses cannot be made in inference mode.
torch.inference_mode = torch.no_grad

from conftest import COMMANDS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

from prism_refactor.calibration.settings import Calibration
from prism_refactor.cli import app as door

NAME = "standin"
aten = torch.ops.aten
# Copying is how tensors change their device; what is indexed on a device may have its indices on the CPU.
COPYING = {aten.copy_, aten._to_copy, aten.to}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


class OnDevice(torch.Tensor):
    """A tensor that says it is on the stand-in."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, device=f"{NAME}:0")
        made.inner = inner
        return made

    def tolist(self):
        return self.inner.tolist()

    def numpy(self):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Installed(TorchDispatchMode):
    """While entered, the device is there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    """One operation: on the device if its tensors are, or if it is asked to make one there."""
    operation, leaves = function.overloadpacket, tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnDevice) and leaf.device.type == "cpu"]
    crossing = operation in COPYING or (operation in INDEXING and isinstance(args[0], OnDevice))
    target = isinstance(args[0], OnDevice) if operation in COPYING | INDEXING else bool(ours)
    # Numbers without a dimension may come from the CPU.
    if ours and any(other.dim() for other in others) and not crossing:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu ({function})")
    for leaf in leaves:
        if isinstance(leaf, torch.device):
            target = leaf.type == NAME
    if operation is aten._local_scalar_dense:
        target = False

    def inside(leaf: Any) -> Any:
        if isinstance(leaf, torch.device) and leaf.type == NAME:
            return torch.device("cpu")
        return leaf.inner if isinstance(leaf, OnDevice) else leaf

    args_inside, kwargs_inside = tree_map(inside, (args, kwargs))
    if operation is aten.histc and not args_inside[0].is_floating_point():
        # GPUs count integers too.
        result = function(args_inside[0].float(), *args_inside[1:], **kwargs_inside).to(args_inside[0].dtype)
    else:
        result = function(*args_inside, **kwargs_inside)
    known = {id(tensor.inner): tensor for tensor in ours}

    def outside(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta":
            return leaf
        if not target:
            return leaf.clone() if id(leaf) in known else leaf
        # In place, or new.
        return known[id(leaf)] if id(leaf) in known else OnDevice(leaf)

    return tree_map(outside, result)


def install() -> None:
    """Make torch know the device, and the commands use it."""
    _setup_privateuseone_for_python_backend(NAME)
    # transformers asks for it.
    torch.get_device_module(NAME).__name__ = f"torch.{NAME}"
    # torch.tensor(..., device=...) makes a CPU tensor and moves it.
    torch._C._set_only_lift_cpu_tensors(True)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", lambda size, dtype=None, **_: OnDevice(torch.empty(size, dtype=dtype)), "PrivateUse1")
    library.impl(
        "empty_strided", lambda size, stride, dtype=None, **_: OnDevice(torch.empty_strided(size, stride, dtype=dtype)), "PrivateUse1"
    )
    install.library = library
    Calibration.resolved_device = lambda self: NAME
    # torch's own checkpointing aborts the process when a Python backend computes a second time during a backward pass.
    PreTrainedModel.activation_checkpointing_enable = lambda self: None


if __name__ == "__main__":
    install()
    with Installed():
        sys.exit(door.run(COMMANDS[sys.argv[1]].main.command, sys.argv[2:]))
