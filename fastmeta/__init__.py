"""fastmeta: meta-learning and few-shot learning over thousands of tasks in one launch."""

from fastmeta import functional  # noqa: F401
from fastmeta._backends import use_backend
from fastmeta._checks import check_labels

__version__ = "0.1.0"
__all__ = ["check_labels", "functional", "use_backend"]
