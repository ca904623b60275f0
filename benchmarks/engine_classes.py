"""Which families vLLM and llama.cpp have a class for: writes prism_refactor/refactoring/engines.json.

    python benchmarks/engine_classes.py VLLM_PYTHON LLAMA_CPP_PYTHON.tar.gz

VLLM_PYTHON is the interpreter of an environment with vLLM. The second is a source distribution, which holds llama.cpp's converter:
`pip download --no-deps --no-binary :all: llama-cpp-python`, or its link on pypi.org.
"""

import argparse
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from prism_refactor.refactoring.engines import CLASSES
from prism_refactor.refactoring.families import PROVEN

# Without those that vLLM runs by transformers' own classes.
_ASK_VLLM = """
import json, vllm
from vllm.model_executor.models import registry
names = vllm.ModelRegistry.get_supported_archs() - registry._TRANSFORMERS_SUPPORTED_MODELS.keys()
print(json.dumps([vllm.__version__, sorted(names)]))
"""
# Families of which vLLM does not take what transformers writes (docs/vllm.md).
_IN_VAIN = ("hy_v3",)


def vllm_classes(python: Path) -> tuple[str, set[str]]:
    """(release, classes)."""
    printed = subprocess.run([python, "-c", _ASK_VLLM], capture_output=True, text=True, check=True).stdout
    release, names = json.loads(printed.splitlines()[-1])
    return f"vLLM {release.partition('+')[0]}", set(names)


def llama_cpp_classes(archive: Path) -> tuple[str, set[str]]:
    """(release, classes)."""
    return f"llama-cpp-python {archive.name.removesuffix('.tar.gz').rpartition('-')[2]}", set(_registered(archive))


def _registered(archive: Path) -> Iterator[str]:
    with tarfile.open(archive) as files:
        for member in files:
            if "/conversion/" in member.name and member.name.endswith(".py"):
                file = files.extractfile(member)
                assert file is not None
                for names in re.findall(r"@ModelBase\.register\(([^)]*)\)", file.read().decode()):
                    yield from re.findall(r"\"(\w+)\"", names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vllm_python", type=Path)
    parser.add_argument("llama_cpp_python", type=Path)
    given = parser.parse_args()
    families = json.loads(PROVEN.read_text())["families"]
    own = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = {}
    for engine, (release, names) in (("vLLM", vllm_classes(given.vllm_python)), ("llama.cpp", llama_cpp_classes(given.llama_cpp_python))):
        failed = _IN_VAIN if engine == "vLLM" else ()
        known = [model_type for model_type in families if own.get(model_type) in names and model_type not in failed]
        found[engine] = {"release": release, "model_types": known}
        print(f"{release}: {len(known)} of {len(families)}")
    CLASSES.write_text(json.dumps(found, indent=2) + "\n")
