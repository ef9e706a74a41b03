"""Loads the compiled extension once, and remembers why it could not."""

from __future__ import annotations

import importlib
from functools import cache

import torch

why_missing: str | None = None
try:
    importlib.import_module("fastmeta._C")
except ImportError as error:
    if importlib.util.find_spec("fastmeta._C") is None:
        why_missing = "the native extension was not built"
    else:
        why_missing = f"the native extension does not load with torch {torch.__version__}: {error}"


@cache
def has_kernel(name: str, device_type: str) -> bool:
    """Whether the extension holds op `name` for `device_type` ("cpu" or "cuda")."""
    if why_missing is not None:
        return False
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmeta_native::{name}", key)
    except RuntimeError:  # an extension older than the op
        return False
