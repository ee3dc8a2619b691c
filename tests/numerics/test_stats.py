"""Statistics merge in any order, ranges hold 0, and expectations agree with brute force."""

from __future__ import annotations

import time
from functools import reduce
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qgraph.errors import CalibrationError
from qgraph.numerics.histogram import BitHistogram, edges, quantile
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.ranges import Mass, entropy_range, mse_range, percentile_range
from qgraph.numerics.reference import dequantize, quantize, scale_zero_point
from qgraph.numerics.spec import QuantSpec, RangeMethod
from qgraph.numerics.stats import Stats, Wanted, find_range, token_sqnr_db

INT8 = QuantSpec(ir.DataType.INT8)
UINT8 = QuantSpec(ir.DataType.UINT8, symmetric=False)
INT4 = QuantSpec(ir.DataType.INT4)
ALL = Wanted(histogram=True, channel_mean_axis=1, channel_range_axis=1, token_power=True)

floats = st.floats(-1e6, 1e6, width=32)
vectors = hnp.arrays(np.float32, st.integers(1, 60), elements=floats)
batches = st.lists(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(3)), elements=floats),
    min_size=1,
    max_size=6,
)
specs = st.sampled_from([INT8, UINT8, INT4, QuantSpec(ir.DataType.UINT8)])


def histogram(x: np.ndarray) -> BitHistogram:
    made = BitHistogram()
    made.add(x)
    return made


def distributions() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=50_000)
    drawn = {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "relu6": np.clip(4 * normal, 0, 6),
        "laplace": rng.laplace(size=50_000),
        "shifted": 3 + normal,
        "negative": -np.abs(normal) - 1,
        "heavy": rng.standard_t(3, size=50_000),
        "softmax": rng.dirichlet(np.full(64, 0.1), 800).reshape(-1),
        "spike": np.append(normal, 2000.0),
    }
    return {name: x.astype(np.float32) for name, x in drawn.items()}


def true_sqnr_db(x: np.ndarray, low: float, high: float, spec: QuantSpec) -> float:
    scale, zero = scale_zero_point(np.float32(low), np.float32(high), spec)
    return sqnr_db(x, dequantize(quantize(x, scale, zero, spec.qmin, spec.qmax), scale, zero))


def expected_sqnr_db(stats: Stats, low: float, high: float, spec: QuantSpec) -> float:
    """The same as a histogram sees it, which is what `mse` searches."""
    assert stats.histogram is not None
    mass = Mass.of(*stats.histogram.bins(), stats.low, stats.high)
    noise = mass.squared_error(np.array([low]), np.array([high]), spec)[0]
    power = mass.weights @ mass.points**3 / 3 + mass.atom_counts @ mass.atoms**2
    return 10 * float(np.log10(power / noise)) if noise > 0 else float("inf")


# --- histogram ------------------------------------------------------------------------------------


@given(hnp.arrays(np.float32, st.integers(0, 200)))
def test_histogram_counts_every_value_once(x: np.ndarray) -> None:
    found = histogram(x)
    finite = x[np.isfinite(x)]
    assert found.count == finite.size
    assert found.nonfinite == x.size - finite.size
    centers, counts = found.bins()
    assert counts.sum() == finite.size
    assert (np.diff(centers) > 0).all()


@given(vectors)
def test_bins_lie_within_a_64th_of_their_values(x: np.ndarray) -> None:
    x = np.where(np.abs(x) < 1e-30, 0, x)
    centers, counts = histogram(x).bins()
    assert np.allclose(np.repeat(centers, counts), np.sort(x), rtol=1 / 64, atol=0)
    low, high = edges(centers, -np.inf, np.inf)
    assert (np.repeat(low, counts) <= np.sort(x)).all()
    assert (np.repeat(high, counts) >= np.sort(x)).all()


def test_zero_has_a_bin_of_its_own() -> None:
    centers, counts = histogram(np.array([0.0, -0.0, 1e-20, -1e-20], np.float32)).bins()
    assert counts.tolist() == [1, 2, 1]
    assert centers[1] == 0.0
    assert np.allclose(centers[[0, 2]], [-1e-20, 1e-20], rtol=1 / 64)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8])
def test_histogram_takes_any_dtype_and_layout(dtype: type) -> None:
    x: np.ndarray = np.arange(48).reshape(6, 8).astype(dtype)
    assert histogram(x[::2, ::3].T) == histogram(x[::2, ::3].astype(np.float32).copy())


def test_overflow_to_float32_counts_as_nonfinite() -> None:
    assert histogram(np.array([1e300, np.nan, -np.inf, 1.0])).nonfinite == 3


def test_histogram_is_fast() -> None:
    x = np.random.default_rng(0).normal(size=2_000_000).astype(np.float32)
    began = time.thread_time()
    histogram(x)
    assert time.thread_time() - began < 0.5


@given(vectors, st.floats(0.01, 0.99))
def test_quantile_is_within_one_bin_of_numpy(x: np.ndarray, q: float) -> None:
    x = np.where(np.abs(x) < 1e-30, 0, x)
    found = quantile(*histogram(x).bins(), q)
    below, above = np.quantile(x, q, method="lower"), np.quantile(x, q, method="higher")
    slack = max(abs(below), abs(above)) / 32 + 1e-30
    assert below - slack <= found <= above + slack


# --- statistics -----------------------------------------------------------------------------------


def same(a: Stats, b: Stats) -> bool:
    exact = (a.count, a.low, a.high) == (b.count, b.low, b.high)
    exact &= a.histogram == b.histogram and a.token_power == b.token_power
    exact &= np.array_equal(a.channel_low, b.channel_low)  # type: ignore[arg-type]
    exact &= np.array_equal(a.channel_high, b.channel_high)  # type: ignore[arg-type]
    return exact and np.allclose(a.channel_mean, b.channel_mean, rtol=1e-9, atol=1e-6)  # type: ignore[arg-type]


@given(batches, st.randoms())
def test_batching_and_order_do_not_matter(parts: list[np.ndarray], random: object) -> None:
    whole = Stats.of(np.concatenate(parts), ALL)
    shuffled = [parts[i] for i in np.random.default_rng(len(parts)).permutation(len(parts))]
    for order in (parts, shuffled):
        assert same(reduce(Stats.merge, [Stats.of(p, ALL) for p in order], Stats()), whole)


@given(batches)
def test_merge_is_commutative_and_associative(parts: list[np.ndarray]) -> None:
    a, b, c = (Stats.of(parts[i % len(parts)] * (i + 1), ALL) for i in range(3))
    assert same(a.merge(b), b.merge(a))
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert a.merge(Stats()) is a
    assert Stats().merge(a) is a


def test_merge_keeps_only_what_both_know() -> None:
    x = np.ones((2, 3), np.float32)
    merged = Stats.of(x, ALL).merge(Stats.of(-x, Wanted(histogram=True)))
    assert merged.histogram is not None
    assert merged.channel_mean is None
    assert str(merged) == "[-1, 1] n=12"


def test_channels_and_tokens_of_an_image() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    found = Stats.of(x, ALL)
    assert found.channel_mean is not None
    assert found.token_power is not None
    assert np.allclose(found.channel_mean, x.mean(axis=(0, 2, 3)))
    assert np.array_equal(found.channel_low, x.min(axis=(0, 2, 3)))  # type: ignore[arg-type]
    assert found.token_power.count == 2 * 3 * 4


def test_nonfinite_values_do_not_spoil_the_extremes() -> None:
    found = Stats.of(np.array([[np.nan, 1.0, -np.inf, 2.0]], np.float32), ALL)
    assert (found.low, found.high) == (1.0, 2.0)


@pytest.mark.parametrize("wanted", [ALL, Wanted()])
def test_stats_survive_the_disk(tmp_path: Path, wanted: Wanted) -> None:
    found = Stats.of(np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), wanted)
    np.savez(tmp_path / "stats.npz", **found.to_arrays())  # type: ignore[arg-type]
    with np.load(tmp_path / "stats.npz") as stored:
        back = Stats.from_arrays(stored)
    assert (back.histogram is None) == (found.histogram is None)
    assert str(back) == str(found)
    if wanted is ALL:
        assert same(back, found)


# --- ranges ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(vectors, specs)
def test_every_range_holds_zero_and_lies_within_the_data(x: np.ndarray, spec: QuantSpec) -> None:
    stats = Stats.of(x, Wanted(histogram=True))
    methods: list[RangeMethod] = ["minmax", "percentile", "entropy", "mse"]
    for method in methods:
        low, high = find_range(stats, spec.with_(observer=method))
        assert min(stats.low, 0) <= low <= 0 <= high <= max(stats.high, 0)
        if (np.abs(x) > np.finfo(np.float32).tiny).any():  # a share of a subnormal may be zero
            assert low < high


@settings(deadline=None)
@given(vectors, specs)
def test_mse_is_never_worse_than_minmax_on_its_own_measure(x: np.ndarray, spec: QuantSpec) -> None:
    stats = Stats.of(x, Wanted(histogram=True))
    low, high = find_range(stats, spec)
    best = find_range(stats, spec.with_(observer="mse"))
    found, plain = expected_sqnr_db(stats, *best, spec), expected_sqnr_db(stats, low, high, spec)
    assert found >= plain - 1e-4


@pytest.mark.parametrize("spec", [INT8, UINT8, INT4], ids=str)
@pytest.mark.parametrize("name", distributions())
def test_mse_finds_the_best_clipping(name: str, spec: QuantSpec) -> None:
    x = distributions()[name]
    stats = Stats.of(x, Wanted(histogram=True))
    found = true_sqnr_db(x, *find_range(stats, spec.with_(observer="mse")), spec)
    ratios = np.linspace(0.05, 1, 96)
    best = max(true_sqnr_db(x, stats.low * r, stats.high * r, spec) for r in ratios)
    assert found > best - 0.1


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
@pytest.mark.parametrize("name", distributions())
def test_percentile_agrees_with_numpy(name: str, percent: float) -> None:
    x = distributions()[name]
    stats = Stats.of(x, Wanted(histogram=True))
    assert stats.histogram is not None
    bins = stats.histogram.bins()
    low, high = percentile_range(*bins, INT8, stats.low, stats.high, percent)
    assert near(max(-low, high), np.abs(x), percent)
    low, high = percentile_range(*bins, UINT8, stats.low, stats.high, percent)
    rest = (100 - percent) / 2
    assert near(low, np.minimum(x, 0), rest)
    assert near(high, np.maximum(x, 0), 100 - rest)


def near(found: float, x: np.ndarray, percent: float) -> bool:
    """Whether `found` is the percentile to 2 % or to 5 elements."""
    slack = 100 * 5 / x.size
    below, above = np.percentile(x, np.clip([percent - slack, percent + slack], 0, 100))
    return bool(below - 0.02 * abs(below) <= found <= above + 0.02 * abs(above))


def test_entropy_clips_the_tails_but_not_a_plateau() -> None:
    drawn = distributions()

    def clipped(name: str, spec: QuantSpec) -> tuple[float, float]:
        stats = Stats.of(drawn[name], Wanted(histogram=True))
        return find_range(stats, spec.with_(observer="entropy"))

    assert clipped("relu6", UINT8) == (0.0, 6.0)
    assert clipped("spike", INT8)[1] < 20
    assert clipped("normal", INT8)[1] > 3
    assert clipped("heavy", INT8)[1] < 0.7 * drawn["heavy"].max()


def test_entropy_never_clips_more_than_a_hundredth() -> None:
    x = distributions()["softmax"]
    stats = Stats.of(x, Wanted(histogram=True))
    _, high = find_range(stats, UINT8.with_(observer="entropy"))
    assert np.mean(x[x != 0] > high) < 0.0101


@pytest.mark.parametrize("spec", [INT8, UINT8, INT4], ids=str)
def test_entropy_of_mass_on_both_extremes_covers_them(spec: QuantSpec) -> None:
    x = np.repeat(np.array([-1, -0.5, 0.25, 1], np.float32), [400, 100, 100, 400])
    stats = Stats.of(x, Wanted(histogram=True))
    assert stats.histogram is not None
    assert entropy_range(*stats.histogram.bins(), spec, stats.low, stats.high) == (-1.0, 1.0)


@pytest.mark.parametrize("spec", [INT8, UINT8, INT4], ids=str)
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("name", distributions())
def test_expected_sqnr_agrees_with_brute_force(
    name: str, method: RangeMethod, spec: QuantSpec
) -> None:
    x = distributions()[name]
    stats = Stats.of(x, Wanted(histogram=True))
    low, high = find_range(stats, spec.with_(observer=method))
    expected = expected_sqnr_db(stats, low, high, spec)
    assert expected == pytest.approx(true_sqnr_db(x, low, high, spec), abs=0.2)


def test_squared_error_is_the_integral_over_each_bin() -> None:
    centers, counts = histogram(np.array([0.3, -1.7, 2.5], np.float32)).bins()
    mass = Mass.of(centers, counts, -np.inf, np.inf)
    found = mass.squared_error(np.array([-1.0, -3.0]), np.array([2.0, 3.0]), UINT8)
    a, b = edges(centers, -np.inf, np.inf)
    dense = np.linspace(a, b, 20_001, dtype=np.float64)
    for error, (low, high) in zip(found, [(-1, 2), (-3, 3)], strict=True):
        scale, zero = scale_zero_point(np.float32(low), np.float32(high), UINT8)
        back = dequantize(quantize(dense.astype(np.float32), scale, zero, 0, 255), scale, zero)
        brute = (np.square(back - dense).mean(axis=0) * counts).sum()
        assert error == pytest.approx(brute, rel=1e-3)


def test_a_spiking_token_ruins_the_median_token() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 64)).astype(np.float32)
    x[0] *= 2000
    stats = Stats.of(x, Wanted(histogram=True, token_power=True))
    scale = float(np.abs(x).max()) / 127
    median = np.median(np.square(x).mean(axis=-1))
    expected = 10 * np.log10(median / (scale**2 / 12))
    assert token_sqnr_db(stats, scale) == pytest.approx(expected, abs=0.2)
    assert (
        token_sqnr_db(stats, scale) < 0 < 30 < expected_sqnr_db(stats, stats.low, stats.high, INT8)
    )


def test_ranges_take_less_than_20_ms() -> None:
    for x in distributions().values():
        bins = histogram(x).bins()
        for spec in (INT8, UINT8):
            for find in (percentile_range, entropy_range, mse_range):
                took = []
                for _ in range(3):
                    began = time.thread_time()
                    find(*bins, spec)
                    took.append(time.thread_time() - began)
                assert min(took) < 0.02


# --- bad input ------------------------------------------------------------------------------------


def test_only_zeros() -> None:
    stats = Stats.of(np.zeros((2, 4), np.float32), ALL)
    for method in ("minmax", "percentile", "entropy", "mse"):
        for spec in (INT8, UINT8):
            assert find_range(stats, spec.with_(observer=method)) == (0.0, 0.0)
    assert expected_sqnr_db(stats, 0.0, 0.0, INT8) == float("inf")
    assert token_sqnr_db(stats, 0.1) == float("-inf")


def test_what_was_not_collected_is_an_error() -> None:
    plain = Stats.of(np.ones(3, np.float32), Wanted())
    with pytest.raises(CalibrationError, match="needs a histogram"):
        find_range(plain, INT8.with_(observer="mse"))
    with pytest.raises(CalibrationError, match="needs a histogram"):
        token_sqnr_db(plain, 1.0)
    with pytest.raises(CalibrationError, match="run time"):
        find_range(plain, INT8.with_(observer="dynamic"))


@pytest.mark.parametrize("x", [np.empty((0, 3)), np.full(3, np.nan)])
def test_nothing_finite_seen_is_an_error(x: np.ndarray) -> None:
    with pytest.raises(CalibrationError, match="no finite value"):
        find_range(Stats.of(x, Wanted()), INT8)
