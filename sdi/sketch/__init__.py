"""Sketches: hashes to buckets, two evaluations of one TensorSketch, and what is stored."""
