"""Regression tasks on functions of one variable, drawn by NumPy as in torchmeta: a seed gives its numbers."""

from fastmeta.compat.torchmeta.toy import helpers
from fastmeta.compat.torchmeta.toy.harmonic import Harmonic
from fastmeta.compat.torchmeta.toy.sinusoid import Sinusoid
from fastmeta.compat.torchmeta.toy.sinusoid_line import SinusoidAndLine

__all__ = ["Harmonic", "Sinusoid", "SinusoidAndLine", "helpers"]
