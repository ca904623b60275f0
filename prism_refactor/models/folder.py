"""What is wrong with a model's folder as it lies there, found before anything is read."""

import json
from pathlib import Path
from typing import Any

from prism_refactor.errors import InputError, one_line
from prism_refactor.files import check_no_pointer

CONFIG, GENERATION = "config.json", "generation_config.json"
_ADAPTER = "adapter_config.json"


def check_folder(folder: Path) -> None:
    """Check a folder that is to hold a model.

    Raises:
        InputError: it holds folders of models instead, or an adapter that transformers would load over the model; a file is a pointer of
            Git LFS; generation_config.json cannot be read, or names what is no token.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a local folder with config.json and safetensors shards")
    for path in folder.iterdir():
        check_no_pointer(path)
    if (folder / _ADAPTER).exists():
        raise InputError(f"{folder / _ADAPTER}: holds an adapter; merge it into its model (peft: merge_and_unload), or remove the file")
    if not (folder / CONFIG).exists():
        _check_inside(folder)
    end_of_text(folder)


def _check_inside(folder: Path) -> None:
    """Raise InputError where there are model folders inside the one that was given: a folder of the Hub's cache, of a training, ..."""
    current = folder / "refs" / "main"
    if current.is_file():
        inside = [folder / "snapshots" / current.read_text().strip()]
    else:
        inside = sorted(path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/{CONFIG}"))
        inside = [path for path in inside if any(path.glob("*.safetensors*"))]
    if inside:
        names = ", ".join(str(path.relative_to(folder)) for path in inside)
        raise InputError(f"{folder}: holds no model itself, but inside: {names}; give that folder")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises InputError when it cannot be read or holds none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no {path.name}; is this a model folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({one_line(error)}); download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object")
    return value


def end_of_text(folder: Path) -> list[int]:
    """Return the tokens that end a text by generation_config.json; none where there is no such file, or it names none."""
    path = folder / GENERATION
    if not path.exists():
        return []
    found = read_json(path).get("eos_token_id")
    tokens = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise InputError(f"{path}: eos_token_id is {json.dumps(found)}; write a token id, or a list of them")
    return tokens
