"""What lies beside the weights of a model folder and is copied with them."""

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from prism_refactor.errors import InputError

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
# What trainings leave in a model's folder: their state, and copies of the model on its way.
TRAINING = ("checkpoint-*", "global_step*", "runs", "wandb", "trainer_state.json", "*.tfevents.*", "zero_to_fp32.py", "latest", "*.distcp")


def _of_a_training(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in TRAINING)


def side_files(source: Path) -> list[Path]:
    """Files of a model folder beside its weights and config.json, relative to it: tokenizer, templates, custom code, ...

    Hidden ones and what a training left there are not among them.
    """
    found = []
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and not _of_a_training(name))
        for name in sorted(name for name in files if not _of_a_training(name)):
            relative = (Path(folder) / name).relative_to(source)
            is_weight = relative.suffix in WEIGHT_SUFFIXES or name.endswith((".safetensors.index.json", ".bin.index.json"))
            if not is_weight and not name.startswith(".") and relative != Path("config.json"):
                found.append(relative)
    return found


def check_side_files(source: Path, written: Iterable[str]) -> int:
    """Check what will be copied beside the weights, before any work.

    Args:
        source: the model folder.
        written: names of the files that the output gets in any case.

    Returns:
        Bytes.

    Raises:
        InputError: something that cannot be read or copied as a file, or a link that leads out of the folder. Links of the
            Hugging Face cache, from models--NAME/snapshots/REVISION to models--NAME/blobs, are followed.
    """
    root = source.resolve()
    for path in [source / name for name in written]:
        if path.is_dir():
            raise InputError(f"{path}: is a folder where the output has a file; rename it")
    for folder, subfolders, _ in os.walk(source):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and not _of_a_training(name)]
        for path in (Path(folder) / name for name in subfolders):
            if path.is_symlink() or not os.access(path, os.R_OK | os.X_OK):
                raise InputError(f"{path}: a link, or not readable, so its files would be left out; copy it or remove it")
    total = 0
    for relative in side_files(source):
        path = source / relative
        if not path.is_file() or not os.access(path, os.R_OK):
            raise InputError(f"{path}: cannot be copied, it is missing, not readable or no regular file; mend it or remove it")
        real = path.resolve()
        if root not in real.parents and real.parent != root.parent.parent / "blobs":
            raise InputError(f"{path}: links to {real}, outside the model folder; copy the file or remove the link")
        total += real.stat().st_size
    return total
