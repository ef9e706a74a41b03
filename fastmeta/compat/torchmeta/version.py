"""Which torchmeta this stands in for."""

VERSION = "1.8.0"
