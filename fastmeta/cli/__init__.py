"""The command `fastmeta`."""

from .main import main

__all__ = ["main"]
