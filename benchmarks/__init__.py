"""How fast, beside whom: workloads, contenders that do the same work, interleaved timing, rooflines, reports."""
