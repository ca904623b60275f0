"""Offloading: run a model whose sub-experts do not fit in fast memory, from a cache of them."""

from serving.offload.cache import Cache, Counters, Pool
from serving.offload.manager import OFFLOADED, Elastic, FastMemory, OffloadManager, load_offloaded
from serving.offload.policies import POLICIES, PREFETCHES, Belady, Policy
from serving.offload.store import READS, DiskStore, PinnedStore

__all__ = [
    "OFFLOADED",
    "POLICIES",
    "PREFETCHES",
    "READS",
    "Belady",
    "Cache",
    "Counters",
    "DiskStore",
    "Elastic",
    "FastMemory",
    "OffloadManager",
    "PinnedStore",
    "Policy",
    "Pool",
    "load_offloaded",
]
