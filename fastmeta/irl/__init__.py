"""Inverse reinforcement learning over distributions of tasks: rewards from a few demonstrations, without labels."""

from .gridworld import GridworldTasks
from .maxent import MaxEntLoss, TabularMaxEntLoss
from .point_mass import PointMassTasks

__all__ = ["GridworldTasks", "MaxEntLoss", "PointMassTasks", "TabularMaxEntLoss"]
