"""Statistics of draws that lie on several hosts are those of the draws in one piece; and who has which of them."""

import numpy as np
import pytest

from partime_mcmc.storage.own import Place, _side_by_side
from partime_mcmc.storage.part_keeper import turns
from partime_mcmc.storage.streaming_statistics import StreamingStatistics
from partime_mcmc.storage.scattered import Sums, batch_size, bins_for, put_together, spread_of
from partime_mcmc.storage.sums import Total
from tests import fakes

CHAINS = 3
X = fakes.chains(3, num_chains=CHAINS, num_samples=3_000, dim=3, memory=0.5)
VALUES = {"mu": 1e3 + X[..., 0], "theta": np.exp(X[..., 1:])}
INFO = {
    "accepted": X[..., 0] > -1,
    "residual": np.round(np.abs(X[..., 1]), 1),
    "acceptance_rate": np.clip(X[..., 2], 0, 1),
}

# Chains and steps of each host, of a chunk of n steps: time in turns, as a mesh of two hosts has it; chains apart;
# everything with one host; and all of that mixed.
CUTS = {
    "time": lambda n: [
        (range(CHAINS), [k for k in range(n) if k // 16 % 2 == host]) for host in range(2)
    ],
    "chains": lambda n: [(range(2), range(n)), (range(2, 3), range(n))],
    "one": lambda n: [(range(CHAINS), range(n))],
    "mixed": lambda n: [
        ((0, 2), range(n // 3)),
        ((0, 2), range(n // 3, n)),
        ((1,), range(0, n, 2)),
        ((1,), range(1, n, 2)),
    ],
}


def of(arrays, chains, steps):
    return {name: array[np.ix_(list(chains), list(steps))] for name, array in arrays.items()}


def scattered(cut, values, info, sizes):
    """The statistics chunk by chunk, each scattered over hosts, and those that one host has."""
    running, whole, bins, done = StreamingStatistics.start(), StreamingStatistics.start(), None, 0
    for size in sizes:
        tiles = [(np.array(chains), done + np.array(steps)) for chains, steps in cut(size)]
        mine = [(of(values, *tile), of(info, *tile), *tile) for tile in tiles]
        bins = bins_for([spread_of(one[0]) for one in mine]) if bins is None else bins
        sums = [Sums.of(*one, batch_size(done + size), bins) for one in mine]
        heard = [
            Sums.from_arrays({name: array.copy() for name, array in one.to_arrays().items()})
            for one in sums
        ]
        running = put_together(running, heard, CHAINS, done + size, bins, {})
        running = StreamingStatistics.from_arrays(running.to_arrays())
        everything = range(CHAINS), range(done, done + size)
        whole, done = whole.update(of(values, *everything), of(info, *everything)), done + size
    return running, whole


def assert_alike(running, whole):
    ours, theirs = running.to_arrays(), whole.to_arrays()
    assert list(ours) == list(theirs)
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype and ours[name].shape == wanted.shape, name
        exact = name in (
            "header",
            "extremes",
            "histogram_first",
            "histogram_counts",
            "histogram_octave",
        )
        np.testing.assert_allclose(
            ours[name], wanted, rtol=0 if exact else 1e-11, atol=0 if exact else 1e-9, err_msg=name
        )
    assert running.layout == whole.layout
    mine, one = running.totals(), whole.totals()
    assert mine.pop("acceptance_rate") == pytest.approx(one.pop("acceptance_rate")) and mine == one
    assert_rows_alike(running, whole)


def assert_rows_alike(running, whole):
    for mine, one in zip(running.summary(), whole.summary(), strict=True):
        assert mine.pop("name") == one.pop("name") and mine == pytest.approx(
            one, rel=1e-10, nan_ok=True
        )


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    "sizes", [(3_000,), (700, 700, 700, 700, 200), (1, 5, 130, 64, 800)], ids=str
)
def test_scattered_statistics_are_those_of_one_piece(cut, sizes):
    if sizes[0] < 3 and cut in ("time", "mixed"):
        sizes = sizes[2:]
    assert_alike(*scattered(CUTS[cut], VALUES, INFO, sizes))


def test_what_is_not_finite_stays_so_wherever_it_lies():
    values, info = (
        {name: array.copy() for name, array in given.items()} for given in (VALUES, INFO)
    )
    values["mu"][1, 900:] = np.nan
    values["theta"][2, 50, 0] = np.inf
    info["residual"][0, [300, 290, 1200]] = np.nan
    running, whole = scattered(CUTS["time"], values, info, (600, 600, 600))
    assert running.totals()["worst"] == whole.totals()["worst"] == (0, 290)
    assert running.totals()["nonfinite"] == whole.totals()["nonfinite"]
    assert_rows_alike(running, whole)


def test_draws_that_are_missing_or_doubled_are_refused():
    def lost(n):
        return [(range(CHAINS), range(0, n // 2)), (range(CHAINS), range(n // 2 + 1, n))]

    for cut in (lost, lambda n: CUTS["one"](n) * 2):
        with pytest.raises(ValueError, match="sums: got .* wanted 64 of each, every step once"):
            scattered(cut, VALUES, INFO, (64,))


def test_many_coordinates_have_no_covariances():
    values = {"x": np.random.default_rng(0).normal(size=(CHAINS, 200, 130))}
    running, whole = scattered(CUTS["time"], values, INFO, (100, 100))
    assert running.comoments is None
    assert_alike(running, whole)


def test_totals_do_not_depend_on_who_comes_first():
    values = np.array([[1.0, 3.0, 3.0, 2.0], [np.nan, 1.0, np.nan, 0.0], [5.0, 1.0, 1.0, 1.0]])
    early, late = Total.of(values[:, :2], 10), Total.of(values[:, 2:], 12)
    for found in (
        early.beside(late),
        late.beside(early),
        Total.nothing(3).beside(early).beside(late),
    ):
        for name, wanted in vars(early.then(late)).items():
            np.testing.assert_array_equal(getattr(found, name), wanted, err_msg=name)


def test_blocks_at_the_same_steps_lie_side_by_side():
    def block(chains, steps):
        return Place(0, chains, steps), (chains, steps)

    # Host 0 has chains 0-2 at two pieces of time, chains 2-4 at the same, and chains 4-6 at another one.
    blocks = [
        block((0, 2), (0, 8)),
        block((2, 4), (16, 24)),
        block((0, 2), (16, 24)),
        block((2, 4), (0, 8)),
        block((4, 6), (8, 16)),
    ]
    (chains, rows), (others, alone) = _side_by_side(blocks)
    assert (
        chains == [(0, 2), (2, 4)]
        and others == [(4, 6)]
        and [steps for steps, _ in alone[0]] == [(8, 16)]
    )
    assert [[one for _, one in row] for row in rows] == [
        [((0, 2), (0, 8)), ((0, 2), (16, 24))],
        [((2, 4), (0, 8)), ((2, 4), (16, 24))],
    ]


def test_turns_follow_time():
    places = [
        Place(0, (0, 1), (0, 4)),
        Place(0, (1, 2), (0, 4)),
        Place(1, (0, 1), (4, 8)),
        Place(1, (1, 2), (4, 8)),
        Place(1, (0, 1), (8, 9)),
        Place(1, (1, 2), (8, 9)),
        Place(0, (0, 2), (9, 10)),
    ]
    assert turns(places[::-1]) == [(0, 0, 4), (1, 4, 9), (0, 9, 10)]
