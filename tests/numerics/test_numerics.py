"""The reference numerics against onnxruntime, bit for bit, and against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qgraph.io.session import open_session, run
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.packing import pack, unpack
from qgraph.numerics.reference import (
    INT32_MAX,
    SMALLEST_SCALE,
    along,
    dequantize,
    quantize,
    quantize_bias,
    quantize_weight,
    scale_zero_point,
    weight_range,
    weight_scale_for_bias,
)
from qgraph.numerics.saturation import can_saturate, quantize_unsaturated, repair_saturation
from qgraph.numerics.spec import PerTensor, QuantSpec
from qgraph.numerics.tokens import (
    SMALLEST_TOKEN,
    SYMMETRIC_GRID,
    TokenGrid,
    dequantize_per_token,
    quantize_per_token,
    token_grid,
)

INT8 = QuantSpec(ir.DataType.INT8)
UINT8 = QuantSpec(ir.DataType.UINT8, symmetric=False)
LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}

weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=6),
    elements=st.floats(-100, 100, width=32),
)


def onnxruntime(text: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """Outputs of a model in the textual syntax of ONNX for inputs x0, x1, ..."""
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\n' + text)
    session = open_session(ir.from_proto(proto), optimized=False, threads=1)
    return run(session, {f"x{i}": a for i, a in enumerate(arrays)})


def awkward(scale: float, zero: int) -> np.ndarray:
    """Every tie and its neighbours, beyond both ends of any 8-bit range, and some extremes."""
    ties = (np.arange(-300, 300) + 0.5) * np.float32(scale)
    ties = ties.astype(np.float32)
    near = [np.nextafter(ties, np.float32(s), dtype=np.float32) for s in (-np.inf, np.inf)]
    extremes = np.array([0, -0.0, 1e30, -1e30, np.inf, -np.inf, 1e-40], np.float32)
    return np.concatenate([ties, *near, extremes])


# --- against onnxruntime --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize(("scale", "zero"), [(1.0, 0), (0.25, 7), (0.1, 100), (1 / 3, 127)])
def test_quantize_is_onnxruntimes_bit_for_bit(dtype: str, scale: float, zero: int) -> None:
    x = awkward(scale, zero)
    text = f"""
    g (float[n] x0, float x1, {dtype} x2) => ({dtype}[n] q, float[n] y) {{
      q = QuantizeLinear (x0, x1, x2)
      y = DequantizeLinear (q, x1, x2)
    }}"""
    s, z = np.float32(scale), np.array(zero, dtype)
    q, y = onnxruntime(text, x, np.asarray(s), z)
    found = quantize(x, s, zero, *LIMITS[dtype])
    assert found.dtype == np.int32
    assert np.array_equal(found, q)
    assert np.array_equal(dequantize(found, s, zero), y)


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_four_bits_are_onnxruntimes_bit_for_bit(dtype: str) -> None:
    zero = 3
    x = awkward(0.3, zero)
    text = f"""
    g (float[n] x0, float x1) => (float[n] y) {{
      zero = Constant <value = {dtype} z {{{zero}}}> ()
      q = QuantizeLinear (x0, x1, zero)
      y = DequantizeLinear (q, x1, zero)
    }}"""
    s = np.float32(0.3)
    (y,) = onnxruntime(text, x, np.asarray(s))
    found = quantize(x, s, zero, *LIMITS[dtype])
    assert np.array_equal(dequantize(found, s, zero), y)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_axis_is_onnxruntimes_bit_for_bit(dtype: str, axis: int) -> None:
    rng = np.random.default_rng(axis)
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    scale = rng.uniform(0.001, 0.1, (x.shape[axis],)).astype(np.float32)
    zero = rng.integers(0, 100, x.shape[axis]).astype(dtype)
    text = f"""
    g (float[a,b,c] x0, float[n] x1, {dtype}[n] x2) => ({dtype}[a,b,c] q, float[a,b,c] y) {{
      q = QuantizeLinear <axis = {axis}> (x0, x1, x2)
      y = DequantizeLinear <axis = {axis}> (q, x1, x2)
    }}"""
    q, y = onnxruntime(text, x, scale, zero)
    wide_scale, wide_zero = along(scale, axis, 3), along(zero.astype(np.int32), axis, 3)
    found = quantize(x, wide_scale, wide_zero, *LIMITS[dtype])
    assert np.array_equal(found, q)
    assert np.array_equal(dequantize(found, wide_scale, wide_zero), y)


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e4, 1e4, width=32)))
def test_asymmetric_uint8_is_dynamic_quantize_linear(x: np.ndarray) -> None:
    if np.ptp(np.append(x, 0)) < 1e-15:
        return
    q, scale, zero = _DYNAMIC.run(None, {"x0": x})
    found_scale, found_zero = scale_zero_point(x.min(), x.max(), UINT8)
    assert found_scale == scale
    assert found_zero == zero
    assert np.array_equal(quantize(x, found_scale, found_zero, 0, 255), q)


_DYNAMIC = open_session(
    ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[n] x0) => (uint8[n] q, float s, uint8 z) {
          q, s, z = DynamicQuantizeLinear (x0)
        }""")
    ),
    optimized=False,
    threads=1,
)


# --- scale and zero point -------------------------------------------------------------------------

ranges = st.tuples(
    st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-(2.0**100), 2.0**100, width=32)
).map(sorted)
specs = st.builds(
    QuantSpec,
    dtype=st.sampled_from(
        [getattr(ir.DataType, f"{u}INT{w}") for u in ("", "U") for w in (2, 4, 8, 16)]
    ),
    granularity=st.just(PerTensor()),
    symmetric=st.booleans(),
)


@given(ranges, specs)
def test_zero_is_exact_and_both_ends_are_covered(ends: list[float], spec: QuantSpec) -> None:
    low, high = np.float32(ends[0]), np.float32(ends[1])
    scale, zero = scale_zero_point(low, high, spec)
    assert scale.dtype == np.float32
    assert zero.dtype == np.int32
    assert scale > 0
    assert spec.qmin <= zero <= spec.qmax

    def back(x: object) -> np.ndarray:
        q = quantize(np.asarray(x, np.float32), scale, zero, spec.qmin, spec.qmax)
        return dequantize(q, scale, zero)

    assert back(0.0) == 0.0
    for end in (low, high):
        assert abs(back(end) - float(end)) <= 0.501 * scale or abs(end) < 1e-15


@pytest.mark.parametrize("dtype", ["INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8"])
def test_symmetric_ranges_mirror(dtype: str) -> None:
    spec = QuantSpec(ir.DataType[dtype])
    scale, zero = scale_zero_point(np.float32(-2), np.float32(2), spec)
    q = quantize(np.array([-2, 2], np.float32), scale, zero, spec.qmin, spec.qmax)
    assert dequantize(q, scale, zero).tolist() == [-2, 2]


def test_a_range_wider_than_float32_still_has_a_finite_scale() -> None:
    scale, zero = scale_zero_point(np.float32(-3e38), np.float32(3e38), UINT8)
    assert np.isfinite(scale)
    assert zero in (127, 128)


@pytest.mark.parametrize("spec", [INT8, UINT8], ids=str)
def test_a_channel_of_zeros_has_a_harmless_scale(spec: QuantSpec) -> None:
    scale, zero = scale_zero_point(np.zeros(3, np.float32), np.zeros(3, np.float32), spec)
    assert (scale == SMALLEST_SCALE).all()
    assert (scale * scale >= np.finfo(np.float32).tiny).all()
    assert (
        dequantize(quantize(np.zeros(3, np.float32), scale, zero, 0, 255), scale, zero) == 0
    ).all()


# --- weights --------------------------------------------------------------------------------------


@given(weights, specs, st.data())
def test_weights_come_back_within_half_a_step(
    w: np.ndarray, spec: QuantSpec, data: st.DataObject
) -> None:
    axis = data.draw(st.one_of(st.none(), st.integers(-w.ndim, w.ndim - 1)))
    q, scale, zero = quantize_weight(w, axis, spec)
    assert q.shape == w.shape
    assert q.min() >= spec.qmin
    assert q.max() <= spec.qmax
    assert scale.shape == zero.shape == (() if axis is None else (w.shape[axis],))
    wide = (
        (scale, zero) if axis is None else (along(scale, axis, w.ndim), along(zero, axis, w.ndim))
    )
    back = dequantize(q, *wide)
    # an asymmetric zero point is itself rounded by up to half a step
    assert (np.abs(back - w) <= wide[0] * 1.001 + 1e-15).all()
    if spec.symmetric:
        assert (np.abs(back - w) <= wide[0] * 0.501 + 1e-15).all()


@given(weights, st.sampled_from([QuantSpec(ir.DataType.INT4), UINT8, INT8]))
def test_searching_the_clipping_never_hurts(w: np.ndarray, spec: QuantSpec) -> None:
    def error(spec: QuantSpec) -> np.ndarray:
        q, scale, zero = quantize_weight(w, 0, spec)
        back = dequantize(q, along(scale, 0, w.ndim), along(zero, 0, w.ndim))
        total: np.ndarray = np.square(back - w, dtype=np.float64).reshape(len(w), -1).sum(axis=1)
        return total

    assert (error(spec.with_(observer="mse")) <= error(spec)).all()


def test_weight_range_of_each_channel() -> None:
    w = np.arange(-12, 12, dtype=np.float32).reshape(2, 3, 4)
    low, high = weight_range(w, -2)
    assert low.tolist() == [-12, -8, -4]
    assert high.tolist() == [3, 7, 11]
    assert weight_range(w, None)[1] == 11


# --- tokens and biases ----------------------------------------------------------------------------


@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-1e4, 1e4, width=32)))
def test_each_token_has_its_own_scale(x: np.ndarray) -> None:
    q, largest = quantize_per_token(x)
    assert largest.shape == (3, 1)
    assert q.min() >= 1
    assert q.max() <= 255
    back = dequantize_per_token(q, largest)
    assert (np.abs(back - x) <= largest * 0.501 / 127 + 1e-15).all()
    for i in range(3):
        alone, own = quantize_per_token(x[i : i + 1])
        assert np.array_equal(alone[0], q[i])
        assert own[0] == largest[i]
    peaks = np.abs(q - 128).max(axis=-1)
    assert (peaks[np.abs(x).max(axis=-1) > 1e-10] == 127).all()


GELU, RELU, SIGMOID = -0.17, 0.0, 0.0


def gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))), dtype=np.float32)


ACTIVATIONS: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    "Relu": (RELU, lambda x: np.maximum(x, 0)),
    "Gelu": (GELU, gelu),
    "Sigmoid": (SIGMOID, lambda x: (1 / (1 + np.exp(-x))).astype(np.float32)),
    "unbounded": (-2.0, lambda x: x),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(
    x=hnp.arrays(np.float32, (3, 5), elements=st.floats(-80, 80, width=32)),
    factor=st.sampled_from([1.0, 1e-3, 1e-9]),
)
def test_bounded_values_come_back_within_half_a_step(
    name: str, x: np.ndarray, factor: float
) -> None:
    lowest, activation = ACTIVATIONS[name]
    grid = token_grid(lowest)
    y = activation(x * np.float32(factor))
    q, largest = quantize_per_token(y, grid)
    assert q.min() >= 0
    assert q.max() <= 255
    back = dequantize_per_token(q, largest, grid)
    assert (np.abs(back - y) <= largest * grid.step * 0.501).all()
    assert (back[y == 0] == 0).all()


@pytest.mark.parametrize("lowest", [0.0, -1e-9, -0.17, -0.375, -1.0])
def test_the_levels_reach_the_lowest_value_in_any_token(lowest: float) -> None:
    grid = token_grid(lowest)
    for largest in (0.0, 1e-12, 0.01, 0.5, 3.0, 1e6):
        x = np.array([[lowest, largest, 0]], np.float32)
        q, magnitude = quantize_per_token(x, grid)
        back = dequantize_per_token(q, magnitude, grid)
        assert (np.abs(back - x) <= magnitude * grid.step * 0.501).all(), largest


def test_grids_of_known_bounds() -> None:
    assert token_grid(0.0) == TokenGrid(np.float32(1 / 255), 0, SMALLEST_TOKEN)
    gelus = token_grid(-0.17)
    assert (gelus.zero, gelus.step) == (32, np.float32(1 / 223))
    assert gelus.floor * gelus.step * 32 == pytest.approx(0.17)
    for unbounded in (None, -1.01, -100.0):
        assert token_grid(unbounded) is SYMMETRIC_GRID


@pytest.mark.parametrize(("name", "better"), [("Relu", 5.5), ("Gelu", 4.0), ("Sigmoid", 5.5)])
def test_bounded_values_keep_more_of_their_signal(name: str, better: float) -> None:
    lowest, activation = ACTIVATIONS[name]
    y = activation(np.random.default_rng(0).normal(0, 1.5, (64, 512)).astype(np.float32))
    symmetric, bounded = (
        sqnr_db(y, dequantize_per_token(*quantize_per_token(y, grid), grid))
        for grid in (SYMMETRIC_GRID, token_grid(lowest))
    )
    assert bounded > symmetric + better


@pytest.mark.parametrize("lowest", [None, 0.0, -0.17])
def test_tokens_of_zeros_stay_zeros(lowest: float | None) -> None:
    grid = token_grid(lowest)
    q, largest = quantize_per_token(np.zeros((2, 4), np.float32), grid)
    assert (q == grid.zero).all()
    assert (largest > 0).all()
    assert (dequantize_per_token(q, largest, grid) == 0).all()


channels = hnp.arrays(np.float32, 6, elements=st.floats(-1e4, 1e4, width=32))


@given(
    channels,
    st.floats(2.0**-20, 10, width=32),
    hnp.arrays(np.float32, 6, elements=st.floats(0, 1, width=32)),
)
def test_no_bias_overflows_once_weight_scales_are_raised(
    bias: np.ndarray, x_scale: float, w_scale: np.ndarray
) -> None:
    w_scale = np.maximum(w_scale, SMALLEST_SCALE)
    raised = weight_scale_for_bias(w_scale, np.float32(x_scale), bias)
    assert (raised >= w_scale).all()
    q, scale = quantize_bias(bias, np.float32(x_scale), raised)
    assert (np.abs(q.astype(np.int64)) <= INT32_MAX // 2 + 128).all()
    assert (scale > 0).all()
    assert (np.abs(q * scale.astype(np.float64) - bias) <= 0.51 * scale + 1e-6 * np.abs(bias)).all()
    enough = np.abs(bias) / (np.float64(x_scale) * w_scale) < INT32_MAX // 2
    assert np.array_equal(raised[enough], w_scale[enough])


def test_a_dead_channel_of_a_dead_input_has_a_usable_bias_scale() -> None:
    dead = np.full(2, SMALLEST_SCALE)
    bias = np.array([0.0, 0.5], np.float32)
    raised = weight_scale_for_bias(dead, SMALLEST_SCALE, bias)
    q, scale = quantize_bias(bias, SMALLEST_SCALE, raised)
    assert np.allclose(q * scale, bias)
    assert (scale >= np.finfo(np.float32).tiny).all()


# --- saturation -----------------------------------------------------------------------------------


def worst_pair_sums(q: np.ndarray, amax: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest and smallest a·w + b·v that vpmaddubsw can meet, from the extreme activations."""
    pairs = q[: q.shape[0] // 2 * 2].reshape(-1, 2, q.shape[1]).astype(np.int64)
    sums = [pairs[:, 0] * a + pairs[:, 1] * b for a, b in itertools.product((0, amax), repeat=2)]
    return np.max(sums, axis=0), np.min(sums, axis=0)


int8s = hnp.arrays(
    np.int32, st.tuples(st.integers(1, 9), st.integers(1, 4)), elements=st.integers(-128, 127)
)
heavy = hnp.arrays(
    np.int32,
    st.tuples(st.integers(2, 8), st.integers(1, 4)),
    elements=st.one_of(st.integers(-128, -100), st.integers(100, 127), st.integers(-2, 2)),
)


@given(st.one_of(int8s, heavy), st.sampled_from([127, 128, 129, 200, 254, 255]))
def test_repaired_pairs_never_saturate_and_the_others_stay(q: np.ndarray, amax: int) -> None:
    high, low = worst_pair_sums(q, amax)
    offending = (high > 32767) | (low < -32768)
    assert np.array_equal(can_saturate(q, amax), offending)
    fixed = repair_saturation(q, amax)
    high, low = worst_pair_sums(fixed, amax)
    assert (high <= 32767).all()
    assert (low >= -32768).all()
    touched = (fixed != q)[: q.shape[0] // 2 * 2].reshape(-1, 2, q.shape[1]).any(axis=1)
    assert np.array_equal(touched, offending)
    if len(q) % 2:
        assert np.array_equal(fixed[-1], q[-1])


@pytest.mark.parametrize("amax", [200, 255])
def test_repair_is_the_nearest_pair_that_fits(amax: int) -> None:
    every = np.arange(-128, 128)
    a, b = (m.reshape(-1) for m in np.meshgrid(every, every, indexing="ij"))
    high = (np.maximum(a, 0) + np.maximum(b, 0)) * amax
    low = (np.minimum(a, 0) + np.minimum(b, 0)) * amax
    fits = (high <= 32767) & (low >= -32768)
    rng = np.random.default_rng(0)
    for i in rng.choice(np.flatnonzero(~fits), 200, replace=False):
        squared = np.square(a - a[i]) + np.square(b - b[i])
        total = np.abs(a - a[i]) + np.abs(b - b[i])
        fixed = repair_saturation(np.array([[a[i]], [b[i]]], np.int32), amax)[:, 0]
        change = np.abs(fixed - [a[i], b[i]])
        assert np.square(change).sum() == squared[fits].min()
        assert change.sum() <= total[fits].min() + 1


@pytest.mark.parametrize("k", [9, 64, 576])
@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform"])
def test_unsaturated_columns_cost_less_than_repair_or_7_bits(draw: str, k: int) -> None:
    w = getattr(np.random.default_rng(0), draw)(size=(k, 64)).astype(np.float32)
    scale = np.abs(w).max(axis=0) / np.float32(127)
    q, wide = quantize_unsaturated(w, scale, 255)
    assert not can_saturate(q, 255).any()
    found = sqnr_db(w, dequantize(q, wide, 0))
    repaired = repair_saturation(quantize(w, scale, 0, -127, 127), 255)
    narrow = (scale * np.float32(127 / 64)).astype(np.float32)
    assert found > sqnr_db(w, dequantize(repaired, scale, 0))
    assert found >= sqnr_db(w, dequantize(quantize(w, narrow, 0, -127, 127), narrow, 0))


def test_columns_that_cannot_saturate_keep_every_bit() -> None:
    w = np.random.default_rng(0).uniform(-1, 1, size=(32, 8)).astype(np.float32)
    w[1::2] *= 0.005
    scale = np.abs(w).max(axis=0) / np.float32(127)
    q, wide = quantize_unsaturated(w, scale, 255)
    assert np.array_equal(wide, scale)
    assert np.array_equal(q, quantize(w, scale, 0, -127, 127))


# --- the rest -------------------------------------------------------------------------------------


@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(0, 33))),
    st.integers(2, 8),
)
def test_packing_round_trips(q: np.ndarray, bits: int) -> None:
    q &= (1 << bits) - 1
    packed = pack(q, bits)
    assert packed.shape == (len(q), math.ceil(q.shape[1] * bits / 8))
    words = np.pad(packed, [(0, 0), (0, -packed.shape[1] % 4)]).view(np.int32).T
    assert np.array_equal(unpack(words, bits)[: q.shape[1]].T, q)


def test_int4_packing_is_the_order_of_onnx() -> None:
    q = np.array([1, -2, 7, -8, 3], np.int32)
    tensor = onnx.helper.make_tensor("q", onnx.TensorProto.INT4, [5], q)
    raw = np.frombuffer(ir.serde.deserialize_tensor(tensor).tobytes(), np.uint8)
    assert np.array_equal(pack((q & 0xF).astype(np.uint8)[np.newaxis], 4)[0], raw)


def test_sqnr() -> None:
    x = np.array([3.0, 4.0])
    assert sqnr_db(x, x) == float("inf")
    assert sqnr_db(x, 1.1 * x) == pytest.approx(20)
    assert sqnr_db(0 * x, x) == float("-inf")


def test_quantize_does_not_warn_about_overflow() -> None:
    x = np.array([3e38, -3e38], np.float32)
    assert quantize(x, SMALLEST_SCALE, 128, 0, 255).tolist() == [255, 0]
