"""Read a Mixture-of-Experts checkpoint lazily, describe its architecture, split its experts, write a new one."""

from checkpoints.architectures import (
    ARCHITECTURES,
    REFUSED,
    Architecture,
    expert_shape,
    moe_block,
    replaced_parts,
    router_name,
    routing_state,
)
from checkpoints.layered import LayeredModel, build_meta_model, names_on_disk
from checkpoints.progress import Progress, versions
from checkpoints.reader import Checkpoint
from checkpoints.split import repeat_routing, split_experts
from checkpoints.writer import (
    MANIFEST,
    STATE,
    ShardWriter,
    check_disk,
    check_side_files,
    check_target,
    finished_layers,
    free_disk,
    gib,
    output_file,
    output_folder,
    save_tensors,
    side_files,
    sync,
    unfinished_bytes,
    write_json,
)

__all__ = [
    "ARCHITECTURES",
    "MANIFEST",
    "REFUSED",
    "STATE",
    "Architecture",
    "Checkpoint",
    "LayeredModel",
    "Progress",
    "ShardWriter",
    "build_meta_model",
    "check_disk",
    "check_side_files",
    "check_target",
    "expert_shape",
    "finished_layers",
    "free_disk",
    "gib",
    "moe_block",
    "names_on_disk",
    "output_file",
    "output_folder",
    "repeat_routing",
    "replaced_parts",
    "router_name",
    "routing_state",
    "save_tensors",
    "side_files",
    "split_experts",
    "sync",
    "unfinished_bytes",
    "versions",
    "write_json",
]
