"""Monoids of maps, prefix scans over them, and the time axis they run along."""

from partime_mcmc.scan.affine import AffineMap, Dense, Diagonal, Identity, Pairs, Zero
from partime_mcmc.scan.gaussian import DenseBelief, DenseMessage, DiagonalBelief, DiagonalMessage
from partime_mcmc.scan.prefix import (
    AssociativeScan,
    ChunkedScan,
    Scan,
    SequentialScan,
    default_scan,
)

__all__ = [
    "AffineMap",
    "AssociativeScan",
    "ChunkedScan",
    "Dense",
    "DenseBelief",
    "DenseMessage",
    "Diagonal",
    "DiagonalBelief",
    "DiagonalMessage",
    "Identity",
    "Pairs",
    "Scan",
    "SequentialScan",
    "Zero",
    "default_scan",
]
