"""Recurrent networks through the same engine: evaluate, differentiate, train."""

from partime_mcmc.rnn.adapters import RNN, from_equinox, from_flax_linen, from_flax_nnx
from partime_mcmc.rnn.cells import (
    ClosedForm,
    Pairs,
    elman,
    elman_diagonal,
    elman_params,
    gru,
    gru_diagonal,
    gru_params,
    lstm,
    lstm_pairs,
    lstm_params,
)
from partime_mcmc.rnn.unroll import UnrollStatus, unroll, unroll_with_status

__all__ = [
    "ClosedForm",
    "Pairs",
    "RNN",
    "UnrollStatus",
    "elman",
    "elman_diagonal",
    "elman_params",
    "from_equinox",
    "from_flax_linen",
    "from_flax_nnx",
    "gru",
    "gru_diagonal",
    "gru_params",
    "lstm",
    "lstm_pairs",
    "lstm_params",
    "unroll",
    "unroll_with_status",
]
