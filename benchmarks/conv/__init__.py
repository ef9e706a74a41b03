"""Convolutional inner loops beside everything that people use in their place: rows, peers, peak memory, a report."""
