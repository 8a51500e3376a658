"""What the benchmarks' processes run: one file a contestant, started as a script, never imported.

Each has the environment of its library; this project is only in those of `*_ours.py`.
"""
