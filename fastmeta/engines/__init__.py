"""Engines run whole inner loops; see `_base.py` for the contract and `select.py` for the choice."""

from ._as_loss import as_loss
from ._base import Engine, InnerLoop
from ._exact import gradients_per_task, twice_differentiable
from ._losses import Loss, check_one_tensor, check_prediction, loss_of_task
from ._steps import PLAIN, Adam, Rates, Rule, Steps
from .select import ENGINES, choose, explain, module_engine

__all__ = [
    "ENGINES",
    "Engine",
    "InnerLoop",
    "Loss",
    "PLAIN",
    "Adam",
    "Rates",
    "Rule",
    "Steps",
    "as_loss",
    "check_one_tensor",
    "check_prediction",
    "choose",
    "explain",
    "gradients_per_task",
    "loss_of_task",
    "module_engine",
    "twice_differentiable",
]
