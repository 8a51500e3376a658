"""Measurements: timings and memory, printed as tables; never part of a pass or a fail."""
