"""The experiments of the papers that this package implements, each claim beside what is measured here.

`python -m benchmarks.papers NAME --size small` runs one of them; see `__main__` for the rest.
"""
