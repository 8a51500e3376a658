"""Looped models of every kind, held against per-row autograd: `python -m tests.zoo`."""
