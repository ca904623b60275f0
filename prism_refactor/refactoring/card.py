"""The model card of a refactored checkpoint."""

from typing import Any

from prism_refactor.formats import Manifest
from prism_refactor.models.modeling_prism import auto_class
from prism_refactor.refactoring.engines import engine_notes

_STOCK = """## Load it

{stock}

```python
from transformers import {loader}, AutoTokenizer

folder = "."  # this folder
model = {loader}.from_pretrained(folder{stock_active})
tokenizer = AutoTokenizer.from_pretrained(folder)
```
"""

_TWO_LEVEL = """
{two_level}

```python
model = {loader}.from_pretrained(folder, trust_remote_code=True{active})
```

`trust_remote_code` runs `modeling_prism.py` from this folder. With prism-refactor installed it is not needed:

```python
import prism_refactor

model = prism_refactor.load(folder, k={half})
prism_refactor.set_active(model, {most})  # as often as you like
prism_refactor.set_active(model, budget=0.25)  # a quarter on average: each token runs what it needs
```
"""

_PLUGIN = """
In vLLM, with the plugin `prism-vllm` (without it vLLM runs the stock router):

```sh
vllm serve . --served-model-name prism --additional-config '{{"prism_k": {half}}}'
curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "prism", "prompt": "Once", "max_tokens": 20, "vllm_xargs": {{"prism_k": {most}}}}}'
```
"""


def model_card(manifest: Manifest, config: Any) -> str:
    """Return Markdown with the front matter that model hubs read; `config`: of the model, from transformers."""
    loader, text_type = auto_class(config).__name__, config.get_text_config().model_type
    source, recipe, tuned = manifest.source, manifest.recipe, manifest.finetuning
    _, (top_k, most), *_ = manifest.result.items()
    parts = {"two-level": "what stands in for dropped sub-experts was", "stock": "the rows of the stock router were"}
    trained = f"Only {parts[tuned.router]} trained ({tuned.best_step} steps)." if tuned else "No weight was trained."
    exact = f"At {most} it computes what the original computes."
    if tuned and tuned.router == "stock":
        exact = (
            f"At {most} the two-level router computes what the original computes; the plain load differs, because its router was trained."
        )
    if source.quantised:
        exact += f" The original is quantised ({source.quantised}); it was read as bfloat16, and is not quantised here."
    values = {"most": most, "half": most // 2, "loader": loader}
    values["stock"] = f"Stock, as a plain `{source.model_type}`, at any k from 1 to {most} active sub-experts per token:"
    if source.dense:
        values["stock"] = f"Stock, as a plain `{source.model_type}`, at {most}: its router is the same for all sub-experts."
        exact += f" The original is a dense {source.dense}; here it is a `{text_type}`, whose attention and norms are the same."
    # Of a model of images and text the size is in a part of the config that a keyword does not reach.
    values["active"] = f", {top_k}={most // 2}" if loader == "AutoModelForCausalLM" else ""
    values["stock_active"] = "" if source.dense else values["active"]
    whole = source.sizes[top_k]
    runs = "runs all" if source.dense else "runs 1 whole expert" if whole == 1 else f"chooses from 1 to {whole} whole experts"
    before, after = manifest.dropped
    engines = "\n".join(f"- {note}" for note in engine_notes(manifest.result, source))
    values["two_level"] = f"With the two-level router, which loses much less below {most}:"
    loads = _STOCK + (_TWO_LEVEL if recipe.has_router else "") + (_PLUGIN if recipe.has_router and source.plain_router else "")
    if not source.stock:
        loads = _STOCK + _TWO_LEVEL
        values |= {
            "stock": f"A plain `{source.model_type}` cannot run split experts. Loaded as one, this is the original:",
            "stock_active": "",
        }
        values["two_level"] = f"With the two-level router, which splits them in memory, at any k from 1 to {most}:"
        # Its config has the original's number.
        values["active"] = ""
    text = f"""---
library_name: transformers
tags: [mixture-of-experts, elastic, prism-refactor]
---
# {source.name}, refactored into sub-experts

Every {"feed-forward network" if source.dense else "expert"} of `{source.name}` is split into {recipe.sub_experts} sub-experts whose
neurons fire together (MoE-Prism, arXiv 2510.19366), so the number of active sub-experts per token can be chosen from 1 to {most}, where
the original {runs}. {trained} {exact}

{loads.format(**values)}
## Where it runs

{engines}

## How it was made

- partition: `{recipe.solver}`, {recipe.kept} of {recipe.sub_experts} sub-experts kept in the objective; share of the activation
  dropped by it, mean over experts: {before:.3f} in stored order, {after:.3f} after
- router: `{recipe.router}`; seed {recipe.seed}
- experts that saw no calibration token: {manifest.unrouted}
- everything else: `prism.json`
"""
    return text
