"""A safetensors checkpoint on disk, read lazily by tensor."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from prism_refactor.errors import InputError, one_line
from prism_refactor.files import LONGEST_NAME
from prism_refactor.formats import PrismConfig
from prism_refactor.models.architectures import Architecture
from prism_refactor.models.dense import TWINS, Twin, has_twin
from prism_refactor.models.discovery import ACTIVE_KEYS, NO_EXPERTS, discover
from prism_refactor.models.folder import CONFIG, check_folder, read_json
from prism_refactor.models.modeling_prism import ROUTER_FILE, run_plainly
from prism_refactor.models.quantised import NOTES, REMEDY, sign_of_quantisation, stored_tensors
from prism_refactor.models.stored import Stored, StoredSlice

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
# Keys that say which layers are dense, and how keys of layers begin that are no attention.
_DENSE_KEYS = (
    *("mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace", "num_dense_layers", "moe_layers", "moe_layer_freq"),
    *("moe_layer_start_index", "moe_layer_end_index", "interleave_moe_layer_step", "mlp_layer_types", "expert_layer_period"),
)
_HYBRID = ("mamba_", "ssm_", "linear_", "conv_")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SAMPLES, _SAMPLE_BYTES = 16, 65536


class Checkpoint:
    """A supported checkpoint in a local folder. A dense one is read as a Mixture-of-Experts model of one expert, see `dense`.

    Opening it reads config.json and every shard's header, so a missing or truncated shard is found before any work.

    Attributes:
        path: the folder.
        config: its transformers config. No code from the folder is ever run.
        dense: the model type of a dense language model; None of a Mixture of Experts. Everything here is its twin's.
        text_config: that of its language model: the same, but in a model that takes images, too.
        inside: see `Twin`; None of a Mixture of Experts.
        architecture: how its experts are split, or were.
        dtype: the type that its config names; None if it names none.
        quantised: how its weights are quantised, as config.json names it; None if they are not. Such tensors are read as bfloat16, and
            what follows describes them so.
        files: names of its shards.
        weight_map: tensor name -> shard file name.
        sizes: tensor name -> size in bytes.
        dtypes: tensor name -> torch dtype (None for a type this tool only passes through).
        shapes: tensor name -> shape.

    Raises:
        InputError: no folder or config, not a supported MoE, a shard missing or truncated.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        check_folder(self.path)
        self.config_json = read_json(self.path / CONFIG)
        if not isinstance(self.config_json.get("auto_map", {}), dict):
            raise InputError(f"{self.path / 'config.json'}: auto_map is no JSON object; correct it or remove it")
        try:
            self.config: Any = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:
            raise InputError(f"{self.path / 'config.json'}: transformers cannot read it: {one_line(error)}") from error
        if isinstance(self.config.get_text_config(), dict):
            raise InputError(f"{self.path / CONFIG}: a model of this type has no text_config; remove it")
        run_plainly(self.config)
        twin = self._twin()
        self.dense: str | None = self.config.get_text_config().model_type if twin else None
        if twin:
            quantised = {"quantization_config": found} if (found := self._quantisation()) else {}
            self.config, self.config_json = twin.config, json.loads(twin.config.to_json_string()) | quantised
        self.text_config: Any = self.config.get_text_config()
        self.inside: str | None = twin.inside if twin else None
        self.dtype: torch.dtype | None = getattr(self.config, "dtype", None) or getattr(self.text_config, "dtype", None)
        if self.text_config is not self.config and not isinstance(self.config_json.get("text_config"), dict):
            raise InputError(f"{self.path / 'config.json'}: its language model is not in text_config; such models are not split")
        self.architecture = self._architecture()
        self.weight_map = self._weight_map()
        self.sizes: dict[str, int] = {}
        self.dtypes: dict[str, torch.dtype | None] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files = sorted(set(self.weight_map.values()))
        self._file_of = dict(self.weight_map)
        self._types: dict[str, str] = {}
        for file in self.files:
            self._read_header(file)
        missing = sorted(set(self.weight_map) - set(self.sizes))
        if missing:
            raise InputError(f"{self.where(missing[0])} is not in it; download the shard again")
        self._stored: dict[str, Stored] = {}
        # Of those that are called otherwise here.
        self._names_on_disk: dict[str, str] = {}
        self.quantised = self._dequantise()
        self._check_layers()
        if twin:
            self._put(lambda: twin.stored(self.shapes, self._types))
        self._check_config()

    def _twin(self) -> Twin | None:
        if not has_twin(self.config):
            return None
        try:
            return Twin(self.config)
        except InputError as error:
            raise InputError(f"{self.path / 'config.json'}: model_type '{self.config.model_type}' cannot be split: {error}") from None

    def _architecture(self) -> Architecture:
        model_type, prism = self.config.model_type, PrismConfig.of(self.config)
        if prism is not None:
            return Architecture.of_refactored(prism)
        try:
            return discover(self.text_config).architecture
        except InputError as error:
            reason = self._why_no_experts() if str(error) == NO_EXPERTS else error
            raise InputError(f"{self.path / 'config.json'}: model_type '{model_type}' cannot be split: {reason}") from None

    def _why_no_experts(self) -> str:
        values = self.text_config.to_dict()
        if any(values.get(key) and hasattr(type(self.text_config), key) for key in ACTIVE_KEYS):
            said = ", ".join(f"{key} {values[key]}" for key in _DENSE_KEYS if values.get(key) is not None)
            layers = f"all its {values.get('num_hidden_layers')} layers are dense, as config.json says"
            return f"{layers} ({said})" if said else layers
        twins = f"of dense models these can be: {', '.join(sorted(TWINS))}"
        if self.text_config is not self.config:
            return f"it has no experts, and its text model is a '{self.text_config.model_type}'; {twins}"
        if any(key.startswith(_HYBRID) for key in values):
            return f"it has no experts, and not all its layers are attention with a dense network; {twins}"
        return f"{NO_EXPERTS}; {twins}"

    def _quantisation(self) -> dict[str, Any] | None:
        """What config.json says of how the weights are quantised."""
        found = self.config_json.get("quantization_config") or (self.config_json.get("text_config") or {}).get("quantization_config")
        if not found and self.config_json.get("compression_config"):
            # As compressed-tensors wrote it at first.
            found = {"quant_method": "compressed-tensors"} | self.config_json["compression_config"]
        return found

    def _dequantise(self) -> str | None:
        """Put the tensors of a quantised checkpoint in the place of those that they are stored in; returns `quantised`."""
        found = self._quantisation()
        sign = sign_of_quantisation(self.shapes, self._types)
        if not found:
            if sign is not None:
                notes = "".join([f" ({name} says how)" for name in NOTES if (self.path / name).exists()][:1])
                said = f"it has a tensor {sign}, and config.json no quantization_config; {REMEDY}"
                raise InputError(f"{self.path}: quantised{notes}: {said}")
            return None
        if sign is None:
            method = found.get("quant_method")
            raise InputError(f"{self.path / CONFIG}: says that it is quantised by '{method}', and no tensor is; remove quantization_config")
        for config in (self.config, self.text_config):
            if hasattr(config, "quantization_config"):
                del config.quantization_config
        self._put(lambda: stored_tensors(found, self.shapes, self._types))
        return str(found["quant_method"])

    def _put(self, find: Callable[[], tuple[dict[str, Stored], set[str]]]) -> None:
        """Put tensors that are stored as others in the place of those; `find` gives them, and the names of what they take the place of."""
        try:
            made, hidden = find()
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None
        for name in hidden:
            for known in (self.weight_map, self.sizes, self.dtypes, self.shapes):
                del known[name]
        for name, stored in made.items():
            self.weight_map[name], self.shapes[name], self._types[name] = self._file(stored.parts[0]), stored.shape, stored.dtype
            self.dtypes[name], self.sizes[name] = DTYPES.get(stored.dtype), _bytes(stored.dtype, list(stored.shape))
        self._stored |= made

    def rename(self, old: str, new: str) -> None:
        """Call a tensor by another name than its own on disk, from now on."""
        facts: list[dict[str, Any]] = [self.weight_map, self.sizes, self.dtypes, self.shapes, self._types, self._stored]
        for known in facts:
            if old in known:
                known[new] = known.pop(old)
        if old in self._file_of:
            self._file_of[new] = self._file_of[old]
        self._names_on_disk[new] = old

    def _file(self, name: str) -> str:
        """The file of a tensor on disk, or of the first part of one that is stored as others."""
        first = self._stored[name].parts[0] if name in self._stored else name
        return self._file_of[name] if first == name else self._file(first)

    def _weight_map(self) -> dict[str, str]:
        # In transformers' order: a single file wins over an index.
        if (self.path / SINGLE_FILE).exists():
            with self._shard(SINGLE_FILE) as shard:
                return dict.fromkeys(shard.keys(), SINGLE_FILE)
        if not (self.path / INDEX_FILE).exists():
            raise InputError(self._what_is_there())
        weight_map = read_json(self.path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{self.path / INDEX_FILE}: has no weight_map; download it again")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or len(file.encode()) > LONGEST_NAME:
                raise InputError(f"{self.path / INDEX_FILE}: {str(file)[:LONGEST_NAME]!r} is not the name of a file in the same folder")
        return weight_map

    def _what_is_there(self) -> str:
        """Why there is no safetensors checkpoint to read."""
        if (self.path / SINGLE_FILE).is_symlink():
            return f"{self.path / SINGLE_FILE}: the file it links to is missing; download it again"
        if any(path.suffix in PICKLES for path in self.path.iterdir()):
            return (
                f"{self.path}: holds pickled weights, which run code when they are read; only safetensors checkpoints are. "
                f'If you trust them, convert: python -c "from transformers import AutoModelForCausalLM as M; '
                f"M.from_pretrained('{self.path}', dtype='auto').save_pretrained('NEW_DIR')\", and copy the tokenizer's files"
            )
        if any(self.path.glob("*-00001-of-*.safetensors")):
            return f"{self.path}: {INDEX_FILE} is missing, which says what is in which shard; download it too"
        others = sorted(path.name for path in self.path.iterdir() if path.suffix in (".safetensors", ".gguf"))
        there = f"; it has {others[0]}, which transformers does not load by itself" if others else ""
        return f"{self.path}: no {SINGLE_FILE} and no {INDEX_FILE}{there}; only safetensors checkpoints are read"

    def _check_config(self) -> None:
        """Sizes that no model can have, and those that the tensors do not bear out: building such a model could take for ever."""
        path, architecture = self.path / "config.json", self.architecture
        try:
            experts, active, _, *_ = architecture.sizes(self.text_config).values()
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if not 1 <= active <= experts:
            raise InputError(f"{path}: {architecture.num_experts} {experts} and {architecture.top_k} {active} make no router; correct it")
        if not any(experts in shape for shape in self.shapes.values()):
            raise InputError(
                f"{path}: {architecture.num_experts} is {experts}, but no tensor has a row for each; "
                f"all layers are dense, or one of the two is of another model"
            )
        length = getattr(self.text_config, "max_position_embeddings", None)
        if length is not None and (not isinstance(length, int) or length < 2):
            raise InputError(f"{path}: max_position_embeddings is {length}; correct it")

    def _check_layers(self) -> None:
        stored = {int(match[1]) for match in map(_LAYER.search, self.shapes) if match}
        layers = self.text_config.num_hidden_layers
        if not isinstance(layers, int) or not 1 <= layers <= len(stored):
            like = f" (a tensor is called {min(self.shapes, key=len)})" if not stored and self.shapes else ""
            like += f" ({SINGLE_FILE} is read, not {INDEX_FILE} beside it)" if self._two_ways() else ""
            raise InputError(
                f"{self.path / 'config.json'}: num_hidden_layers is {layers}, the shards hold {len(stored)} layers{like}; "
                "complete the checkpoint"
            )

    def _two_ways(self) -> bool:
        return all((self.path / name).exists() for name in (SINGLE_FILE, INDEX_FILE))

    @contextmanager
    def _shard(self, file: str) -> Iterator[Any]:
        path = self.path / file
        if not path.is_file():
            what = "is no regular file" if path.exists() else "the file it links to is missing" if path.is_symlink() else "shard is missing"
            raise InputError(f"{path}: {what}; download it again")
        try:
            with safe_open(path, framework="pt") as shard:
                yield shard
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: truncated or not a safetensors file ({error}); download it again") from None

    def _read_header(self, file: str) -> None:
        with self._shard(file) as shard:
            for name in shard.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
                if self.weight_map.get(name) == file:
                    part = shard.get_slice(name)
                    self._types[name] = part.get_dtype()
                    self.dtypes[name] = DTYPES.get(part.get_dtype())
                    self.shapes[name] = tuple(part.get_shape())
                    self.sizes[name] = _bytes(part.get_dtype(), part.get_shape())

    def where(self, name: str) -> str:
        """How an error names one of the tensors."""
        return f"{self.path / self.weight_map[name]}: tensor {name}"

    @contextmanager
    def slices(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Lazy safetensors slices of some tensors, some of them made from others; the shards are unmapped on exit."""
        with ExitStack() as stack:
            shards: dict[str, Any] = {}

            def part(name: str) -> Any:
                stored = self._stored.get(name)
                if stored is None:
                    return on_disk(name)
                # A quantised tensor that keeps its name is a part of itself.
                own = self._names_on_disk.get(name, name)
                return StoredSlice(stored, *(on_disk(each) if each == own else part(each) for each in stored.parts))

            def on_disk(name: str) -> Any:
                file = self._file_of[name]
                if file not in shards:
                    shards[file] = stack.enter_context(self._shard(file))
                return shards[file].get_slice(self._names_on_disk.get(name, name))

            yield {name: part(name) for name in names}

    def fingerprint(self) -> str:
        """SHA-256 over config.json and, for each file of tensors, its name, size and 16 evenly spaced 64 KiB samples.

        The first sample holds the header. Tells one checkpoint from another without reading all of it; the sub-expert router counts.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        router = [ROUTER_FILE] if (self.path / ROUTER_FILE).exists() else []
        for file in sorted({*self.files, *router}):
            size = (self.path / file).stat().st_size
            digest.update(f"{file}:{size}".encode())
            with open(self.path / file, "rb") as stream:
                for sample in range(_SAMPLES):
                    stream.seek(size * sample // _SAMPLES)
                    digest.update(stream.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def _bytes(dtype: str, shape: list[int]) -> int:
    """Size of a tensor from its safetensors type name, which holds the width in bits: F8_E4M3, BF16, I64; BOOL takes a byte."""
    bits = re.search(r"\d+", dtype)
    return math.prod(shape) * (int(bits[0]) if bits else 8) // 8
