"""Which rows make a task."""

from fastmeta.compat.easyfsl.samplers.task_sampler import TaskSampler

__all__ = ["TaskSampler"]
