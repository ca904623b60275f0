"""Tasks of lm_eval over documents of ours, for the tests and benchmarks/tasks.py."""

import json
from pathlib import Path

# Of lm_eval: which of some continuations is the most likely.
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}


def write_task(folder: Path, name: str, documents: list[dict], kind: dict) -> None:
    """A task of lm_eval over documents of ours, as a file of a folder that its --include_path names."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    data = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps(task | kind))
