"""Engines run whole inner loops; see `_base.py` for the contract and `select.py` for the choice."""

from ._base import Engine, InnerLoop
from ._losses import as_loss
from .select import ENGINES, choose, explain

__all__ = ["ENGINES", "Engine", "InnerLoop", "as_loss", "choose", "explain"]
