"""Other libraries on one Linear called three times: `python -m tests.benchmarks.peers`."""
