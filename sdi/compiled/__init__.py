"""Kernels for CPUs, compiled by numba. Each file is loaded by a function that asks for it."""
