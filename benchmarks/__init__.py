"""Benchmarks: every figure that the documentation quotes comes from a script in this folder."""
