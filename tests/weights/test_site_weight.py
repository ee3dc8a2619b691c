"""The integers of a weight: in slices as whole, with floors, and where pairs could saturate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import PipelineError
from qgraph.graph.annotation import IN, SPEC, STATS
from qgraph.graph.sites import Site, reduction_rows, site_of, sites
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.reference import along, dequantize, quantize, quantize_weight, scale_zero_point
from qgraph.numerics.saturation import can_saturate
from qgraph.numerics.spec import NUMPY, PerAxis, PerBlock, PerTensor, QuantSpec
from qgraph.numerics.stats import Stats, Wanted
from qgraph.weights.formats import linear as module
from qgraph.weights.formats.linear import quantize_in_slices
from qgraph.weights.site_weight import activation_scale, constant_bias, quantize_site, unsaturated
from tests.models import build, weight

W8 = QuantSpec(granularity=PerAxis(0), observer="absmax")
A8 = QuantSpec(ir.DataType.UINT8, symmetric=False)
MATMUL = "g (float[N,8] x) => (y) { y = MatMul (x, w) }"
CONV = "g (float[1,4,8,8] x) => (y) { y = Conv (x, w, b) }"


def site(text: str, *tensors: ir.TensorProtocol, x: np.ndarray | None = None) -> Site:
    """The last site of a model, its data calibrated on `x` and static if given, else dynamic."""
    model = build(text, *tensors)
    found = list(sites(model))[-1]
    data = A8 if x is not None else A8.with_(observer="dynamic")
    found.node.meta[IN] = {found.x_index: data}
    if x is not None:
        axis = 1 if found.kind == "conv" else -1
        found.x.meta[STATS] = Stats.of(x, Wanted(channel_range_axis=axis))
    return found


SPECS = st.builds(
    QuantSpec,
    dtype=st.sampled_from([ir.DataType.INT8, ir.DataType.UINT8]),
    symmetric=st.booleans(),
    observer=st.sampled_from(["absmax", "mse"]),
    bits=st.sampled_from([0, 2, 4, 7]),
)


@settings(max_examples=60, deadline=None)
@given(
    spec=SPECS,
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    axis=st.integers(0, 3),
    chunk=st.integers(1, 200),
    seed=st.integers(0, 99),
    half=st.booleans(),
)
def test_slices_give_what_the_whole_gives(
    spec: QuantSpec, shape: list[int], axis: int, chunk: int, seed: int, half: bool
) -> None:
    kind = np.float16 if half else np.float32
    w = np.random.default_rng(seed).standard_normal(shape).astype(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk)
        for along_axis in (axis % len(shape), None):
            found = quantize_in_slices(w, along_axis, spec)
            wanted = quantize_weight(w.astype(np.float32), along_axis, spec)
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(a, b)
            assert found[0].dtype == NUMPY[spec.dtype]


@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_floor_raises_the_scales_below_it_and_the_integers_follow(axis: int | None) -> None:
    w = weight("w", 4, 6, spread=1000).numpy()
    _, bare, _ = quantize_in_slices(w, axis, W8)
    floor = np.full(w.shape[axis or 0], np.median(bare), np.float32)
    q, scale, zero = quantize_in_slices(w, axis, W8, floor)
    np.testing.assert_array_equal(scale, np.maximum(bare, floor.max()))
    wide = (along(scale, axis, 2), along(zero, axis, 2)) if axis is not None else (scale, zero)
    np.testing.assert_array_equal(q, quantize(w, *wide, -127, 127))


def test_rows_are_in_the_order_in_which_kernels_add() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)
    found = site("g (float[1,3,4,4] x) => (y) { y = Conv (x, w) }", weight("w", 5, 3, 2, 2))
    w = found.weight.const_value.numpy()  # type: ignore[union-attr]
    rows = reduction_rows(w, found)
    patch = x[0, :, :2, :2]
    np.testing.assert_allclose(
        patch.transpose(1, 2, 0).reshape(-1) @ rows, (patch * w).sum(axis=(1, 2, 3)), rtol=1e-5
    )
    flat = np.arange(6).reshape(2, 3)
    column = site("g (float[N,2] x) => (y) { y = MatMul (x, w) }", weight("w", 2, 3))
    row = site("g (float[N,3] x) => (y) { y = Gemm <transB = 1> (x, w) }", weight("w", 2, 3))
    np.testing.assert_array_equal(reduction_rows(flat, column), flat)
    np.testing.assert_array_equal(reduction_rows(flat, row), flat.T)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["matmul", "gemm", "conv"]),
    k=st.integers(1, 9),
    n=st.integers(1, 9),
    top=st.integers(100, 255),
    chunk=st.sampled_from([1, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_repaired_weights_cannot_saturate_and_only_bad_channels_change(
    kind: str, k: int, n: int, top: int, chunk: int, seed: int
) -> None:
    texts = {
        "matmul": (f"g (float[N,{k}] x) => (y) {{ y = MatMul (x, w) }}", (k, n)),
        "gemm": (f"g (float[N,{k}] x) => (y) {{ y = Gemm <transB = 1> (x, w) }}", (n, k)),
        "conv": (f"g (float[1,{k},5,5] x) => (y) {{ y = Conv (x, w) }}", (n, k, 3, 2)),
    }
    text, shape = texts[kind]
    w = np.random.default_rng(seed).choice([-1.0, -0.7, 0.1, 0.9, 1.0], shape).astype(np.float32)
    found = site(text, ir.Tensor(w, name="w"))
    q, scale, _ = quantize_in_slices(w, found.axis, W8)
    before, old = q.copy(), scale.copy()
    bad = can_saturate(reduction_rows(q.astype(np.int32), found), top).any(axis=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk)
        assert unsaturated(w, q, scale, found, top) == bad.sum()
    assert not can_saturate(reduction_rows(q.astype(np.int32), found), top).any()
    np.testing.assert_array_equal(
        reduction_rows(q, found)[:, ~bad], reduction_rows(before, found)[:, ~bad]
    )
    np.testing.assert_array_equal(scale[~bad], old[~bad])
    assert (scale >= old).all()
    assert (scale <= old * np.float32(2)).all()
    if bad.any():
        assert sqnr_db(w, dequantize(q, along(scale, found.axis, w.ndim), 0)) > 20


def test_what_calibration_showed_decides_what_is_repaired() -> None:
    w = ir.Tensor(np.ones((8, 2), np.float32), name="w")
    spec = W8.with_(granularity=PerAxis(1))
    assert quantize_site(site(MATMUL, w), spec, True).repaired == 2
    x = np.ones((4, 8), np.float32)
    assert quantize_site(site(MATMUL, w, x=x), spec, True).repaired == 2
    x[:, :7] = 0.4  # 102 of 255, but for the last pair
    assert quantize_site(site(MATMUL, w, x=x), spec, True).repaired == 2
    found = site(MATMUL, w, x=x)
    found.x.meta[STATS] = Stats(40, 0.0, 1.0, channel_high=np.full(8, 0.4))
    assert quantize_site(found, spec, True).repaired == 0


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("g (float[1,4,8,8] x) => (y) { y = Conv <group = 4> (x, w) }", (4, 1, 3, 3)),
        ("g (float[1,4,8,8] x) => (y) { y = ConvTranspose (x, w) }", (4, 3, 2, 2)),
        ("g (int64[3] x) => (y) { y = Gather (w, x) }", (8, 8)),
    ],
)
def test_kernels_that_add_no_pairs_need_no_repair(text: str, shape: tuple[int, ...]) -> None:
    found = site(text, ir.Tensor(np.ones(shape, np.float32), name="w"))
    if found.kind == "gather":
        found.node.meta[IN] = {}
    assert quantize_site(found, W8.with_(granularity=PerAxis(found.axis)), True).repaired == 0


@pytest.mark.parametrize(
    "changes", [{"bits": 7}, {"granularity": PerTensor()}, {"symmetric": False}]
)
def test_specs_that_need_no_repair(changes: dict[str, object]) -> None:
    found = site(MATMUL, ir.Tensor(np.ones((8, 2), np.float32), name="w"))
    spec = W8.with_(granularity=PerAxis(1)).with_(**changes)
    assert quantize_site(found, spec, True).repaired == 0


def test_the_float_of_the_integers() -> None:
    found = site(CONV, weight("w", 3, 4, 2, 2, spread=100), weight("b", 3))
    result = quantize_site(found, W8, False)
    w = weight("w", 3, 4, 2, 2, spread=100).numpy()
    steps = along(result.scale, 0, 4)
    assert (np.abs(result.float() - w) <= steps / 2 * 1.001).all()
    flat = quantize_site(found, W8.with_(granularity=PerTensor()), False)
    assert flat.axis is None
    assert (np.abs(flat.float() - w) <= flat.scale / 2 * 1.001).all()


def test_the_scale_of_a_value() -> None:
    x = np.array([[-1, 3] * 4], np.float32)
    found = site(MATMUL, weight("w", 8, 2), x=x)
    scale, zero = activation_scale(found.x)
    assert (scale, zero) == scale_zero_point(np.float32(-1), np.float32(3), A8)
    found.x.meta[SPEC] = QuantSpec()
    assert activation_scale(found.x)[1] == 0


MOVED = """
g (float[1,2,4,4] x) => (y) {
  m = MaxPool <kernel_shape = [2,2]> (x)
  y = Conv (m, w)
}"""


def test_what_moves_data_keeps_the_scale_of_its_source() -> None:
    found = site(MOVED, weight("w", 3, 2, 1, 1), x=np.ones((1, 2, 3, 3), np.float32))
    move = found.x.producer()
    assert move is not None
    move.inputs[0].meta[STATS] = Stats(9, -4.0, 4.0)  # type: ignore[union-attr]
    own = activation_scale(found.x)
    assert own == scale_zero_point(np.float32(0), np.float32(1), A8)
    move.meta[IN] = {0: A8}
    assert activation_scale(found.x) == scale_zero_point(np.float32(-4), np.float32(4), A8)
    move.meta[IN] = {0: QuantSpec()}
    assert activation_scale(found.x) == own


def test_the_bias_that_integer_kernels_can_add() -> None:
    def gemm(bias: object, attributes: str = "") -> np.ndarray | None:
        text = f"g (float[4,8] x) => (y) {{ y = Gemm {attributes} (x, w, b) }}"
        data = ir.Tensor(np.asarray(bias, np.float32), name="b")
        return constant_bias(site(text, weight("w", 8, 4), data))

    for bias in (2.0, [2.0], [[2.0]], [2.0] * 4, [[2.0] * 4]):
        np.testing.assert_array_equal(gemm(bias), np.full(4, 2, np.float32))
    assert gemm([[1.0], [2.0], [3.0], [4.0]]) is None
    assert gemm(np.ones((4, 4))) is None
    assert gemm([2.0] * 4, "<alpha = 2.0>") is None
    assert gemm([2.0] * 4, "<beta = 2.0>") is None
    assert constant_bias(site(MATMUL, weight("w", 8, 4))) is None
    conv = site(CONV, weight("w", 3, 4, 2, 2), weight("b", 3))
    np.testing.assert_array_equal(constant_bias(conv), weight("b", 3).numpy())


def test_values_without_statistics_and_specs_that_cannot_be_written() -> None:
    found = site(MATMUL, weight("w", 8, 2), x=np.ones((1, 8), np.float32))
    with pytest.raises(PipelineError, match="insert-qdq cannot write 'int16 per-block"):
        quantize_site(found, QuantSpec(ir.DataType.INT16, PerBlock(0, 4)), False)
    del found.x.meta[STATS]
    with pytest.raises(PipelineError, match="'x' is to be quantized statically but was not"):
        quantize_site(found, W8, False)


def test_mapped_weights_are_read_and_left_as_they_are(tmp_path: Path) -> None:
    w = weight("w", 8, 4).numpy()
    (tmp_path / "w.bin").write_bytes(w.tobytes())
    mapped = ir.ExternalTensor(
        "w.bin", 0, w.nbytes, ir.DataType.FLOAT, name="w", shape=ir.Shape(w.shape),
        base_dir=tmp_path,
    )  # fmt: skip
    model = build(MATMUL, weight("w", 8, 4))
    model.graph.initializers["w"].const_value = mapped
    found = site_of(model.graph[0])
    assert found is not None
    result = quantize_site(found, W8.with_(granularity=PerAxis(1)), True)
    np.testing.assert_array_equal(result.q, quantize_weight(w, 1, W8)[0])
    assert (tmp_path / "w.bin").read_bytes() == w.tobytes()
