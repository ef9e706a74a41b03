"""`torchopt.version`: which TorchOpt this stands in for."""

__version__ = "0.7.3"
