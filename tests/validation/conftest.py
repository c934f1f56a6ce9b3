"""Whole runs on real posteriors: most of their time is the model's, so that some optimisation of machine code pays."""

import pytest

from partime_mcmc import compile_cache as programs


@pytest.fixture(autouse=True, scope="module")
def optimised():
    """Level 1 where the suite's tests otherwise do without."""
    before = dict(programs.CPU_OPTIONS)
    programs.CPU_OPTIONS.setdefault("xla_backend_optimization_level", 1)
    yield
    programs.CPU_OPTIONS.clear()
    programs.CPU_OPTIONS.update(before)
