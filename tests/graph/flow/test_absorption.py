"""Factors for the channels of a value: where they can go, that x becomes x / s, and where not."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from benchmarks import zoo
from qgraph.graph.editing import add_constant
from qgraph.graph.flow.absorption import Absorption, absorption, divide, merge
from qgraph.graph.flow.channels import reshaped
from qgraph.graph.provenance import layer
from qgraph.graph.reading import array, constant, node_name
from qgraph.graph.sites import Site, sites
from qgraph.graph.types import infer_types
from qgraph.io.feeds import Feed
from qgraph.io.models import load
from qgraph.io.random_feed import first_feed
from qgraph.io.session import open_session, run
from qgraph.numerics.noise import relative_error
from qgraph.passes.canonicalize import Canonicalize
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.recipes.recipe import FLOAT_STAGE
from qgraph.torch.from_module import trace
from tests.models import build, feed, outputs, transformer_block, weight
from tests.pipelines import ONNX, body, golden

MICROSOFT = "com.microsoft."
Constant = tuple[int, ...] | list[int] | np.ndarray | np.generic
"""Of a test graph: the shape of a random weight, integers, or the array itself."""


def graph(
    text: str,
    constants: Mapping[str, Constant],
    inputs: str = "float[2,3,4] v",
    types: str = "",
    opset: int = 21,
    results: str = "",
) -> ir.Model:
    """A model whose `text` computes x, which `y = MatMul (x, w)` reads.

    Args:
        types: of values that onnx does not infer.
        results: further outputs.
    """
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
        f"g ({inputs}) => (float y{results}) <{types}> {{ {text} y = MatMul (x, w) }}"
    )
    for name, data in {"w": (4, 5), **constants}.items():
        tensor = weight(name, *data) if isinstance(data, tuple) else ir.Tensor(np.array(data))
        tensor.name = name
        initializer = ir.to_proto(tensor)
        assert isinstance(initializer, onnx.TensorProto)
        proto.graph.initializer.append(initializer)
    model = ir.from_proto(proto)
    for output in model.graph.outputs:
        output.shape = None
    infer_types(model)
    return model


def value(model: ir.Model, name: str) -> ir.Value:
    """The value called `name`, in any graph."""
    computed = [v for n in model.graph.all_nodes() for v in n.outputs]
    given_ = [*model.graph.inputs, *model.graph.initializers.values()]
    return next(v for v in (*computed, *given_) if v.name == name)


def found(model: ir.Model, name: str = "x") -> Absorption | None:
    """Where x can be divided when all its readers make up for it."""
    x = value(model, name)
    return absorption(x, [use.node for use in x.uses()])


def computed(model: ir.Model, name: str = "x") -> np.ndarray:
    """What onnxruntime computes for a value of the main graph."""
    copy = model.clone()
    copy.graph.outputs.append(value(copy, name))
    return outputs(copy, feed(model))[-1]


def check(model: ir.Model, factors: np.ndarray, name: str = "x", rtol: float = 1e-5) -> None:
    """Divide x by the factors, merged; x must change by them, bit by bit for powers of two."""
    before = computed(model, name)
    place = found(model, name)
    assert place is not None
    factors = merge(place.ties, factors.astype(np.float32))
    divide(model, place, factors)
    after = computed(model, name)
    powers = np.array_equal(np.exp2(np.round(np.log2(factors))), factors)
    if powers:
        assert np.array_equal(after * factors, before)
    scale = np.abs(before).max(initial=0)
    np.testing.assert_allclose(after * factors, before, rtol=rtol, atol=rtol * scale)


# --- each operator ------------------------------------------------------------------------------

Edits = list[tuple[str, int, object]]
"""Operator, input, channels."""


@dataclass(frozen=True)
class Case:
    """A way from v to x and where the factors of x go."""

    text: str
    constants: dict[str, Constant]
    edits: Edits = field(default_factory=list)
    ties: list[int] | None = None
    inputs: str = "float[2,3,4] v"
    types: str = ""
    opset: int = 21
    results: str = ""
    where: str | None = None

    @property
    def model(self) -> ir.Model:
        return graph(self.text, self.constants, self.inputs, self.types, self.opset, self.results)


X = "float[2,3,4] x"
FOUR = [0, 1, 2, 3]
HEADS = [[0, 1], [2, 3]]
SIXTEEN = list(range(16))
LINEAR: dict[str, Constant] = {"a": (4, 4)}
VALUES = "m = MatMul (v, a) "
SPLIT_HEADS = "s = Reshape (m, heads) t = Transpose <perm = [0,2,1,3]> (s) "
JOIN_HEADS = "u = Transpose <perm = [0,2,1,3]> (o) x = Reshape (u, joined)"
JOINED: dict[str, Constant] = {"heads": [2, 3, 2, 2], "joined": [2, 3, 4]}
PROBABILITIES = "float[2,3,4] v, float[2,2,3,3] p"
LENGTHS: dict[str, Constant] = {
    "lengths": np.full(2, 2, np.int32),
    "total": np.array(3, np.int32),
    "w": (16, 5),
}

CASES = {
    # normalizations
    "layer norm": Case(
        "x = LayerNormalization (v, g, b)",
        {"g": (4,), "b": (4,)},
        [("LayerNormalization", 1, FOUR), ("LayerNormalization", 2, FOUR)],
        where="norm weight of 'x'",
    ),
    "layer norm without shift": Case(
        "x = LayerNormalization (v, g)", {"g": (4,)}, [("LayerNormalization", 1, FOUR)]
    ),
    "layer norm over two axes": Case(
        "x = LayerNormalization <axis = 1> (v, g)", {"g": (3, 4)}, [("LayerNormalization", 1, FOUR)]
    ),
    "layer norm of heads": Case(
        "n = LayerNormalization (v, g) x = Reshape (n, joined)",
        {"g": (2,), "joined": [2, 3, 4]},
        [("LayerNormalization", 1, [0, 1])],
        ties=[0, 1, 0, 1],
        inputs="float[2,3,2,2] v",
    ),
    "rms norm": Case(
        "x = RMSNormalization (v, g)", {"g": (4,)}, [("RMSNormalization", 1, FOUR)], opset=23
    ),
    "simplified layer norm": Case(
        "x = SimplifiedLayerNormalization <axis = -1> (v, g)",
        {"g": (4,)},
        [("SimplifiedLayerNormalization", 1, FOUR)],
        types=X,
    ),
    "skip layer norm": Case(
        f"x = {MICROSOFT}SkipLayerNormalization (v, r, g, b, c)",
        {"g": (4,), "b": (4,), "c": (4,)},
        [("SkipLayerNormalization", 2, FOUR), ("SkipLayerNormalization", 3, FOUR)],
        inputs=X.replace("x", "v") + ", " + X.replace("x", "r"),
        types=X,
    ),
    "skip simplified layer norm": Case(
        f"x, i, j, sum = {MICROSOFT}SkipSimplifiedLayerNormalization (v, r, g, c)",
        {"g": (4,), "c": (4,)},
        [("SkipSimplifiedLayerNormalization", 2, FOUR)],
        inputs=X.replace("x", "v") + ", " + X.replace("x", "r"),
        types=X,
        results=", float sum",
        where="norm weight of 'x'",
    ),
    "norm written out": Case(
        """m = ReduceMean (v, last) c = Sub (v, m) q = Mul (c, c) s = ReduceMean (q, last)
        t = Add (s, eps) r = Sqrt (t) n = Div (c, r) k = Mul (g, n) x = Add (k, b)""",
        {"last": [-1], "g": (4,), "b": (4,), "eps": np.float32(1e-5)},
        [("Mul", 0, FOUR), ("Add", 1, FOUR)],
        where="weight of 'k'",
    ),
    # elementwise
    "factor": Case("e = Exp (v) x = Mul (e, g)", {"g": (4,)}, [("Mul", 1, FOUR)]),
    "factor of one element": Case(
        "n = LayerNormalization (v, g) x = Mul (n, half)",
        {"g": (4,), "half": np.float32(0.3)},
        [("LayerNormalization", 1, FOUR)],
    ),
    "gated": Case(
        f"{VALUES} h = MatMul (v, c) i = Sigmoid (h) silu = Mul (h, i) x = Mul (silu, m)",
        LINEAR | {"c": (4, 4)},
        [("MatMul", 1, FOUR)],
        where="weight of 'm'",
    ),
    "term": Case(
        f"{VALUES} x = Add (b, m)",
        LINEAR | {"b": (4,)},
        [("Add", 0, FOUR), ("MatMul", 1, FOUR)],
        where="weight of 'm'",
    ),
    "term of one element": Case(
        f"{VALUES} x = Add (m, b)",
        LINEAR | {"b": np.float32(0.7)},
        [("MatMul", 1, FOUR), ("Add", 1, FOUR)],
    ),
    "term for each row": Case(
        f"{VALUES} x = Sub (b, m)",
        LINEAR | {"b": (3, 1)},
        [("Sub", 0, FOUR), ("MatMul", 1, FOUR)],
    ),
    "two computed terms": Case(
        f"{VALUES} n = MatMul (v, c) x = Add (m, n)",
        LINEAR | {"c": (4, 4)},
        [("MatMul", 1, FOUR), ("MatMul", 1, FOUR)],
    ),
    "numerator": Case(f"{VALUES} e = Exp (v) x = Div (m, e)", LINEAR, [("MatMul", 1, FOUR)]),
    "homogeneous": Case(
        f"""{VALUES} c = Neg (m) d = Relu (c) e = LeakyRelu (d) f = PRelu (e, slope)
        h = Identity (f) i = Dropout (h) j = Cast <to = 11> (i) x = Cast <to = 1> (j)""",
        LINEAR | {"slope": (4,)},
        [("MatMul", 1, FOUR)],
    ),
    # matrix products
    "gemm": Case(
        "x = Gemm <alpha = 0.5, beta = 2.0> (v, a, b)",
        LINEAR | {"b": (1,)},
        [("Gemm", 1, FOUR), ("Gemm", 2, FOUR)],
        inputs="float[3,4] v",
        where="weight of 'x'",
    ),
    "gemm, transposed": Case(
        "x = Gemm <transB = 1> (v, a)",
        LINEAR,
        [("Gemm", 1, [[i] for i in FOUR])],
        inputs="float[3,4] v",
    ),
    "gemm of computed operands": Case(
        "m = MatMul (u, a) n = MatMul (v, a) x = Gemm (v, m, n)",
        LINEAR,
        [("MatMul", 1, FOUR), ("MatMul", 1, FOUR)],
        inputs="float[3,4] v, float[4,4] u",
    ),
    "a product for each head": Case(
        "o = MatMul (v, a) " + JOIN_HEADS,
        {"a": (2, 4, 2), "joined": [2, 3, 4]},
        [("MatMul", 1, [[[0, 1]], [[2, 3]]])],
        inputs="float[2,2,3,4] v",
    ),
    "heads that share a product": Case(
        "o = MatMul (v, a) " + JOIN_HEADS,
        {"a": (4, 2), "joined": [2, 3, 4]},
        [("MatMul", 1, [0, 1])],
        ties=[0, 1, 0, 1],
        inputs="float[2,2,3,4] v",
    ),
    # attention written out
    "values of attention": Case(
        f"{VALUES} k = Add (m, b) s = Reshape (k, heads) t = Transpose <perm = [0,2,1,3]> (s)"
        f" o = MatMul (p, t) {JOIN_HEADS}",
        LINEAR | JOINED | {"b": (4,)},
        [("MatMul", 1, FOUR), ("Add", 1, FOUR)],
        inputs=PROBABILITIES,
    ),
    "heads in the batch": Case(
        f"{VALUES} {SPLIT_HEADS} f = Reshape (t, folded) h = MatMul (p, f) o = Reshape (h, parted)"
        f" {JOIN_HEADS}",
        LINEAR | JOINED | {"folded": [4, 3, 2], "parted": [2, 2, 3, 2]},
        [("MatMul", 1, FOUR)],
        inputs="float[2,3,4] v, float[4,3,3] p",
    ),
    "repeated value heads": Case(
        f"""{VALUES} {SPLIT_HEADS} k = Unsqueeze (t, two) e = Expand (k, wide)
        r = Reshape (e, narrow) o = MatMul (p, r) {JOIN_HEADS}""",
        JOINED
        | {"a": (4, 2), "heads": [2, 3, 1, 2], "two": [2], "wide": [2, 1, 2, 3, 2]}
        | {"narrow": [2, 2, 3, 2]},
        [("MatMul", 1, [0, 1])],
        ties=[0, 1, 0, 1],
        inputs=PROBABILITIES,
    ),
    "broadcast value heads": Case(
        f"{VALUES} {SPLIT_HEADS} o = MatMul (p, t) {JOIN_HEADS}",
        JOINED | {"a": (4, 2), "heads": [2, 3, 1, 2]},
        [("MatMul", 1, [0, 1])],
        ties=[0, 1, 0, 1],
        inputs=PROBABILITIES,
    ),
    "queries, keys and values in one": Case(
        f"""{VALUES} q, k, t = Split <axis = 2, num_outputs = 3> (m)
        c = Transpose <perm = [0,2,1]> (k) d = MatMul (q, c) p = Softmax (d) x = MatMul (p, t)""",
        {"a": (4, 12)},
        [("MatMul", 1, [-1] * 8 + FOUR)],
    ),
    # moving elements
    "squeezed": Case(
        "m = Unsqueeze (v, one) n = LayerNormalization (m, g) x = Squeeze (n, one)",
        {"one": [1], "g": (4,)},
        [("LayerNormalization", 1, FOUR)],
    ),
    "flattened": Case(
        "n = LayerNormalization (v, g) x = Flatten (n)",
        {"g": (2, 2)},
        [("LayerNormalization", 1, [[0, 1], [2, 3]])],
        inputs="float[3,2,2] v",
        types="float[3,2,2] n",
    ),
    "last token, gathered": Case(
        "n = LayerNormalization (v, g) x = Gather <axis = 1> (n, last)",
        {"last": np.array(-1), "g": (4,)},
        [("LayerNormalization", 1, FOUR)],
    ),
    "last token, sliced": Case(
        "n = LayerNormalization (v, g) x = Slice (n, last, end, one)",
        {"last": [-1], "end": [9], "one": [1], "g": (4,)},
        [("LayerNormalization", 1, FOUR)],
    ),
    "shape read": Case(
        f"{VALUES} s = Shape (m) r = Relu (m) x = Reshape (r, s)", LINEAR, [("MatMul", 1, FOUR)]
    ),
    # attention in one operator
    "grouped queries, packed": Case(
        f"""{VALUES} x = {MICROSOFT}GroupQueryAttention <num_heads = 2, kv_num_heads = 1>
        (m, , , , , lengths, total)""",
        LENGTHS | {"a": (16, 32)},
        [("MatMul", 1, [-1] * 24 + SIXTEEN[:8])],
        ties=SIXTEEN[:8] * 2,
        inputs="float[2,3,16] v",
        types="float[2,3,16] x",
    ),
    "grouped queries": Case(
        f"""{VALUES} x, k, c = {MICROSOFT}GroupQueryAttention <num_heads = 4, kv_num_heads = 2>
        (v, u, m, , , lengths, total)""",
        LENGTHS | {"a": (32, 16), "w": (32, 5)},
        [("MatMul", 1, [*range(8), *range(16, 24)])],
        ties=[*range(8)] * 2 + [*range(16, 24)] * 2,
        inputs="float[2,3,32] v, float[2,3,16] u",
        types="float[2,3,32] x",
    ),
    "attention of onnxruntime": Case(
        f"x = {MICROSOFT}Attention <num_heads = 2> (v, a, b)",
        {"a": (16, 48), "b": (48,), "w": (16, 5)},
        [("Attention", 1, [-1] * 32 + SIXTEEN), ("Attention", 2, [-1] * 32 + SIXTEEN)],
        inputs="float[2,3,16] v",
        types="float[2,3,16] x",
    ),
    "multi-head attention": Case(
        f"{VALUES} x = {MICROSOFT}MultiHeadAttention <num_heads = 2> (v, v, m, b)",
        {"a": (16, 16), "b": (48,), "w": (16, 5)},
        [("MatMul", 1, SIXTEEN), ("MultiHeadAttention", 3, [-1] * 32 + SIXTEEN)],
        inputs="float[2,3,16] v",
        types="float[2,3,16] x",
    ),
    "attention, one axis for heads and width": Case(
        f"{VALUES} x = Attention <q_num_heads = 4, kv_num_heads = 2> (v, u, m)",
        {"a": (16, 8), "w": (16, 5)},
        [("MatMul", 1, [0, 1, 2, 3, 8, 9, 10, 11])],
        ties=[0, 1, 2, 3] * 2 + [8, 9, 10, 11] * 2,
        inputs="float[2,3,16] v, float[2,3,8] u",
        opset=23,
    ),
    "attention, heads apart": Case(
        f"{VALUES} {SPLIT_HEADS} o = Attention (q, k, t) {JOIN_HEADS}",
        {"a": (16, 8), "w": (16, 5), "heads": [2, 3, 2, 4], "joined": [2, 3, 16]},
        [("MatMul", 1, [0, 1, 2, 3, 8, 9, 10, 11])],
        ties=[0, 1, 2, 3] * 2 + [8, 9, 10, 11] * 2,
        inputs="float[2,3,16] v, float[2,4,3,4] q, float[2,2,3,4] k",
        opset=23,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_where_the_factors_go(case: Case) -> None:
    place = found(case.model)
    assert place is not None
    edits = [(e.node.op_type, e.index, e.channels.tolist()) for e in place.edits]
    assert edits == case.edits
    assert place.ties.tolist() == (case.ties or list(range(place.ties.size)))
    assert case.where in (None, place.where)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_x_is_divided_by_the_factors(case: Case) -> None:
    rng = np.random.default_rng(0)
    count = int(case.model.graph.initializers["w"].shape[0])  # type: ignore[index, arg-type]
    check(case.model, rng.uniform(0.1, 10, count))
    check(case.model, np.exp2(rng.integers(-3, 4, count)))


def test_before_and_after() -> None:
    gamma = np.array([1, 2, 3, 4], np.float32)
    model = graph(
        "n = LayerNormalization (v, g) z = Mul (n, two) x = Add (z, b)",
        {"g": gamma, "two": np.float32(2), "b": np.array([1], np.float32)},
    )
    place = found(model)
    assert place is not None
    divide(model, place, np.array([1, 2, 4, 8], np.float32))
    PassManager([Canonicalize()], verify=True).run(model, Context(ONNX))
    assert body(model, weights=True) == golden("""
        weight %w = f32[4, 5] {#fbfa7b56}
        weight %two = f32[] {2.0}
        weight %g_scaled = f32[4] {1.0, 1.0, 0.75, 0.5}
        weight %b_scaled = f32[4] {1.0, 0.5, 0.25, 0.125}
        %n: f32[2, 3, 4] = LayerNormalization(%v, %g_scaled)
        %z: f32[2, 3, 4] = Mul(%n, %two)
        %x: f32[2, 3, 4] = Add(%z, %b_scaled)
        %y: f32[2, 3, 5] = MatMul(%x, %w)
    """)


# --- a whole model, with its readers ------------------------------------------------------------


def smooth(model: ir.Model) -> list[tuple[list[Site], Absorption]]:
    """Divide the data of linear sites by random factors where it can be, and multiply the weights.

    Returns:
        the sites that share their data, and where it was divided.
    """
    rng = np.random.default_rng(0)
    shared: dict[ir.Value, list[Site]] = {}
    for site in sites(model):
        if site.kind in ("matmul", "gemm"):
            shared.setdefault(site.x, []).append(site)
    places = []
    for x, readers in shared.items():
        place = absorption(x, {site.node for site in readers})
        if place is None:
            continue
        factors = np.exp2(rng.uniform(-2, 2, place.ties.size)).astype(np.float32)
        factors = merge(place.ties, factors)
        divide(model, place, factors)
        for site in readers:
            w = array(site.weight)
            assert w is not None
            rows = factors if site.axis == 0 else factors[:, np.newaxis]
            index, smoothed = site.w_index, add_constant(model, "smoothed", w * rows)
            site.node.replace_input_with(index, smoothed)
        places.append((readers, place))
    return places


def test_a_block_of_a_transformer() -> None:
    model = transformer_block()
    wanted = outputs(model, feed(model))
    places = smooth(model)
    assert {" ".join(s.name for s in readers): place.where for readers, place in places} == {
        "q k v": "norm weight of 'n1'",
        "o": "weight of 'v'",
        "gate up": "norm weight of 'n2'",
        "down": "weight of 'up'",
    }
    for a, b in zip(wanted, outputs(model, feed(model)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_constants_that_others_read_stay_as_they_are() -> None:
    text = f"{VALUES} x = Add (m, b) k = MatMul (v, a) z = Add (k, b)"
    model = graph(text, {"a": (4, 4), "b": (4,)}, results=", float z")
    before = outputs(model, feed(model))[1]
    check(model, np.array([1, 2, 4, 8]))
    assert np.array_equal(outputs(model, feed(model))[1], before)
    assert {"a", "b", "a_scaled", "b_scaled"} <= set(model.graph.initializers)


def test_in_a_branch_with_weights_of_the_main_graph() -> None:
    text = """
    g (bool flag, float[2,4] v) => (float[2,5] y) {
      y = If (flag) <
        then_branch = a () => (float[2,5] y1) { x = LayerNormalization (v, g) y1 = MatMul (x, w) },
        else_branch = b () => (float[2,5] y2) { y2 = MatMul (v, w) }
      >
    }"""
    model = build(text, weight("g", 4), weight("w", 4, 5))
    infer_types(model)
    feeds = [feed(model) | {"flag": np.array(flag)} for flag in (True, False)]
    wanted = [outputs(model, f)[0] for f in feeds]
    assert [place.where for _, place in smooth(model)] == ["norm weight of 'x'"]
    for given_, reference in zip(feeds, wanted, strict=True):
        np.testing.assert_allclose(outputs(model, given_)[0], reference, rtol=1e-5, atol=1e-5)


def test_a_mapped_weight_is_not_held_in_memory(tmp_path: Path) -> None:
    width = 3000
    model = graph(VALUES + "x = Relu (m)", {"a": (4, width), "w": (width, 5)})
    ir.save(model, tmp_path / "model.onnx", external_data="model.data")
    model = load(tmp_path / "model.onnx")
    original = constant(value(model, "a"))
    assert isinstance(original, ir.ExternalTensor)
    check(model, np.linspace(1, 9, width))
    tensor = model.graph.initializers["a_scaled"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert not tensor.cache
    assert original.raw is None  # nor is the file's content


def test_twice() -> None:
    model = graph("x = LayerNormalization (v, g)", {"g": (4,)})
    check(model, np.array([1, 2, 4, 8]))
    check(model, np.array([8, 4, 2, 1]))
    first, last = (array(value(model, name)) for name in ("g", "g_scaled_scaled"))
    assert first is not None
    assert last is not None
    assert np.array_equal(last * 8, first)


def role(node: ir.Node) -> str:
    """The last part of the layer's name."""
    return re.split("[./]", layer(node) or node_name(node).rpartition("/")[0])[-1]


def check_whole(model: ir.Model, given_: Feed) -> Counter[str]:
    """All sites at once. Returns what goes where, and how many channels share a factor."""
    before = run(open_session(model, optimized=False), given_)
    places = smooth(model)
    after = run(open_session(model, optimized=False), given_)
    assert max(map(relative_error, before, after)) < 1e-4
    return Counter(
        f"{' '.join(role(site.node) for site in readers)} -> {role(place.edits[0].node)}"
        f" /{place.ties.size // np.unique(place.ties).size}"
        for readers, place in places
    )


def prepared(path: Path) -> tuple[ir.Model, Feed]:
    given_ = first_feed(load(path), None, 0)
    model = load(path)
    PassManager(FLOAT_STAGE).run(model, Context(ONNX))
    return model, given_


@pytest.mark.slow
def test_a_folder_of_genai() -> None:
    assert check_whole(*prepared(zoo.smollm2_genai())) == {
        "qkv_proj -> input_layernorm /1": 30,
        "gate_proj up_proj -> post_attention_layernorm /1": 30,
        "down_proj -> up_proj /1": 30,
        "lm_head -> final_norm_layernorm /1": 1,
    }  # what o_proj reads comes from the cache


@pytest.mark.slow
def test_an_encoder_of_torch() -> None:
    assert check_whole(*prepared(zoo.minilm_onnx())) == {"dense -> value /1": 6}


@pytest.mark.slow
def test_a_traced_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    ids = torch.randint(0, 64, (2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = transformers.LlamaForCausalLM(config).eval()
        model = trace(module, {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}})
    PassManager(FLOAT_STAGE).run(model, Context(ONNX))
    assert check_whole(model, {"input_ids": ids[:, :5].numpy()}) == {
        "q_proj k_proj v_proj -> input_layernorm /1": 2,
        "o_proj -> v_proj /2": 2,
        "gate_proj up_proj -> post_attention_layernorm /1": 2,
        "down_proj -> up_proj /1": 2,
        "lm_head -> norm /1": 1,
    }


# --- what is declined ---------------------------------------------------------------------------

NORM = "n = LayerNormalization (v, g) "
G: dict[str, Constant] = {"g": (4,)}
DECLINED = {
    "read elsewhere": Case("x = LayerNormalization (v, g) z = Relu (x)", G, results=", float z"),
    "an output": Case("x = LayerNormalization (v, g)", G, results=", float x"),
    "an input": Case("", {}, inputs="float[2,3,4] x"),
    "an input with a default": Case(
        f"{VALUES} x = Relu (m)", LINEAR, inputs="float[2,3,4] v, float[4,4] a"
    ),
    "of unknown width": Case("x = Relu (v)", {}, inputs="float[2,3,N] v"),
    "of an unknown operator": Case("x = com.microsoft.Norm (v, g)", G, types=X),
    "a norm read on the way": Case(NORM + "x = Relu (n) z = Exp (n)", G, results=", float z"),
    "a norm that is an output": Case(NORM + "x = Relu (n)", G, results=", float n"),
    "the mean of a norm": Case("n, x = LayerNormalization (v, g)", G | {"w": (1, 5)}),
    "instance norm": Case("x = InstanceNormalization (v, g, g)", {"g": (3,)}),
    "sigmoid": Case(NORM + "x = Sigmoid (n)", G),
    "softmax": Case(NORM + "x = Softmax (n)", G),
    "square": Case(NORM + "x = Mul (n, n)", G),
    "swish": Case(NORM + "s = Sigmoid (n) x = Mul (n, s)", G),
    "gelu": Case(NORM + "x = Gelu (n)", G),
    "gelu written out": Case(
        NORM + "c = Div (n, r) e = Erf (c) a = Add (e, i) p = Mul (n, a) x = Mul (p, h)",
        G | {"r": np.float32(2**0.5), "i": np.float32(1), "h": np.float32(0.5)},
    ),
    "shift of what does not scale": Case(NORM + "s = Sigmoid (n) x = Add (s, b)", G | {"b": (4,)}),
    "residual": Case(NORM + "x = Add (v, n)", G),
    "denominator": Case("x = Div (i, v)", {"i": np.float32(1)}),
    "factor for each row": Case("e = Exp (v) x = Mul (r, e)", {"r": (3, 1)}),
    "computed term for each row": Case(
        NORM + "k = MatMul (v, c) x = Add (n, k)", G | {"c": (4, 1)}
    ),
    "channels that are rows": Case(
        "m = MatMul (a, v) x = Transpose <perm = [0,2,1]> (m)", {"a": (4, 3)}
    ),
    "product of a vector": Case(
        "m = MatMul (r, v) x = Transpose <perm = [0,2,1]> (m)",
        {"r": (3,)},
        inputs="float[2,4,3,4] v",
    ),
    "half precision": Case(
        "c = Cast <to = 10> (v) n = Mul (c, g) x = Cast <to = 1> (n)",
        {"g": np.ones(4, np.float16)},
    ),
    "integers": Case("n = Mul (v, g) i = Cast <to = 6> (n) x = Cast <to = 1> (i)", G),
    "two values side by side": Case(NORM + "x = Concat <axis = 2> (n, n)", G | {"w": (8, 5)}),
    "split along another axis": Case(
        NORM + "x, z = Split <axis = 0, num_outputs = 2> (n)", G, results=", float z"
    ),
    "gathered channels": Case(NORM + "x = Gather <axis = 2> (n, i)", G | {"i": [3, 2, 1, 0]}),
    "sliced channels": Case(
        NORM + "x = Slice (n, i, e, axes)",
        {"g": (8,), "i": [0], "e": [4], "axes": [-1]},
        inputs="float[2,3,8] v",
    ),
    "tokens in a channel": Case(
        f"{VALUES} x = Reshape (m, s)",
        LINEAR | {"s": [2, 12], "w": (12, 5)},
        inputs="float[2,time,4] v",
    ),
    "values that go into a cache": Case(
        f"""{VALUES} x, k, c = {MICROSOFT}GroupQueryAttention <num_heads = 2, kv_num_heads = 1>
        (m, , , , , lengths, total)""",
        LENGTHS | {"a": (16, 32)},
        inputs="float[2,3,16] v",
        types="float[2,3,16] x",
        results=", float c",
    ),
    "values that come from a cache": Case(
        f"""{VALUES} x, k, c = {MICROSOFT}GroupQueryAttention <num_heads = 2, kv_num_heads = 1>
        (m, , , old, older, lengths, total)""",
        LENGTHS | {"a": (16, 32)},
        inputs="float[2,3,16] v, float[2,1,4,8] old, float[2,1,4,8] older",
        types="float[2,3,16] x",
    ),
}


@pytest.mark.parametrize("case", DECLINED.values(), ids=list(DECLINED))
def test_what_is_declined(case: Case) -> None:
    model = case.model
    x = value(model, "x")
    products = [use.node for use in x.uses() if use.node.op_type == "MatMul"]
    assert products
    assert absorption(x, products) is None


def test_a_reader_that_does_not_make_up_for_it() -> None:
    model = graph(
        "x = LayerNormalization (v, g) z = MatMul (x, w)", {"g": (4,)}, results=", float z"
    )
    x = value(model, "x")
    first, second = (use.node for use in x.uses())
    assert absorption(x, [first]) is None
    assert absorption(x, [first, second]) is not None


def test_a_value_that_a_branch_reads() -> None:
    text = """
    g (bool flag, float[2,4] v) => (float[2,5] y) {
      x = LayerNormalization (v, g)
      y = If (flag) <
        then_branch = a () => (float[2,5] y1) { y1 = MatMul (x, w) },
        else_branch = b () => (float[2,5] y2) { y2 = MatMul (v, w) }
      >
    }"""
    assert found(build(text, weight("g", 4), weight("w", 4, 5))) is None


# --- random chains ------------------------------------------------------------------------------


@dataclass
class Chain:
    """A graph under construction. `shape` is that of its last value."""

    shape: list[int]
    text: str = ""
    inputs: str = ""
    constants: dict[str, Constant] = field(default_factory=dict)
    count: int = 0

    def input(self, shape: list[int]) -> str:
        name = f"i{self.inputs.count('float')}"
        self.inputs += f"{', ' if self.inputs else ''}float[{','.join(map(str, shape))}] {name}"
        return name

    def constant(self, data: Constant) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = data
        return name

    def then(self, text: str, shape: Iterable[int] | None = None) -> None:
        """Append an operator on the last value, `{}` in its text; it returns this shape."""
        self.text += f"h{self.count + 1} = {text.format(f'h{self.count}')} "
        self.count += 1
        self.shape = self.shape if shape is None else list(shape)


@st.composite
def chains(draw: st.DrawFn) -> ir.Model:
    """A product or a norm, then up to eight operators that pass scales on, then the reader."""
    chain = Chain([2, 3, 4])
    chain.text = f"h0 = Identity ({chain.input(chain.shape)}) "
    linear(chain, draw)
    linear(chain, draw)
    for _ in range(draw(st.integers(0, 8))):
        step = draw(st.sampled_from([pointwise, binary, permute, regroup, mix, repeat, take]))
        step(chain, draw)
    constants: dict[str, Constant] = chain.constants | {"w": (chain.shape[-1], 3)}
    text = f"{chain.text} x = Identity (h{chain.count})"
    return graph(text, constants, chain.inputs)


def linear(chain: Chain, draw: st.DrawFn) -> None:
    width = chain.shape[-1]
    if width > 1 and draw(st.booleans()):
        g, b = chain.constant((width,)), chain.constant((width,))
        chain.then(f"LayerNormalization ({{}}, {g}, {b})")
    else:
        n = draw(st.integers(1, 6))
        chain.then(f"MatMul ({{}}, {chain.constant((width, n))})", [*chain.shape[:-1], n])


def pointwise(chain: Chain, draw: st.DrawFn) -> None:
    chain.then(draw(st.sampled_from(["Relu", "Neg", "LeakyRelu", "Identity"])) + " ({})")


def binary(chain: Chain, draw: st.DrawFn) -> None:
    """With a constant or an input of the same shape or one that is broadcast."""
    kept = [n if draw(st.booleans()) else 1 for n in chain.shape][draw(st.integers(0, 2)) :]
    if draw(st.booleans()):
        other = chain.constant(
            np.random.default_rng(chain.count).uniform(0.5, 2, kept or [1]).astype(np.float32)
        )
        operator = draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
    else:
        other, operator = chain.input(kept or [1]), "Mul"
    swapped = operator != "Div" and draw(st.booleans())
    chain.then(f"{operator} ({other}, {{}})" if swapped else f"{operator} ({{}}, {other})")


def permute(chain: Chain, draw: st.DrawFn) -> None:
    order = draw(st.permutations(range(len(chain.shape))))
    chain.then(f"Transpose <perm = {list(order)}> ({{}})", [chain.shape[i] for i in order])


def regroup(chain: Chain, draw: st.DrawFn) -> None:
    """Two axes become one, or one becomes two."""
    at, shape = draw(st.integers(0, len(chain.shape) - 1)), chain.shape
    if at and len(shape) > 2 and draw(st.booleans()):
        shape = [*shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :]]
    else:
        factor = draw(st.sampled_from([n for n in (1, 2, 3) if shape[at] % n == 0]))
        shape = [*shape[:at], factor, shape[at] // factor, *shape[at + 1 :]]
    chain.then(f"Reshape ({{}}, {chain.constant(shape)})", shape)


def mix(chain: Chain, draw: st.DrawFn) -> None:
    """The value of an attention whose probabilities are an input."""
    *batch, time, width = chain.shape
    probabilities = chain.input([*(n if draw(st.booleans()) else 1 for n in batch), 2, time])
    chain.then(f"MatMul ({probabilities}, {{}})", [*batch, 2, width])


def repeat(chain: Chain, draw: st.DrawFn) -> None:
    at = draw(st.integers(0, len(chain.shape)))
    shape = [*chain.shape[:at], 1, *chain.shape[at:]]
    chain.then(f"Unsqueeze ({{}}, {chain.constant([at])})", shape)
    shape[at] = 2
    chain.then(f"Expand ({{}}, {chain.constant(shape)})", shape)


def take(chain: Chain, draw: st.DrawFn) -> None:
    """One half of an axis, or one index of it."""
    at = draw(st.integers(0, len(chain.shape) - 1))
    before, size, after = chain.shape[:at], chain.shape[at], chain.shape[at + 1 :]
    if size % 2 == 0 and draw(st.booleans()):
        first, text = draw(st.booleans()), f"Split <axis = {at}, num_outputs = 2> ({{}}) "
        other = f"o{chain.count}"
        shape = [*before, size // 2, *after]
        name = f"h{chain.count + 1}"
        made = f"{name}, {other}" if first else f"{other}, {name}"
        chain.text += f"{made} = " + text.format(f"h{chain.count}")
        chain.count, chain.shape = chain.count + 1, shape
    elif len(chain.shape) > 2:
        index = chain.constant(np.array(size - 1))
        chain.then(f"Gather <axis = {at}> ({{}}, {index})", [*before, *after])


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.filter_too_much])
@given(chains(), st.integers(0, 2**16))
def test_random_chains(model: ir.Model, seed: int) -> None:
    place = found(model)
    assume(place is not None)
    assert place is not None
    rng = np.random.default_rng(seed)
    check(model.clone(deep_copy=True), rng.uniform(0.1, 10, place.ties.size), rtol=1e-4)
    check(model, np.exp2(rng.integers(-3, 4, place.ties.size)))


# --- the mathematics ----------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 9, width=32)), min_size=1), st.booleans())
def test_tied_channels_share_a_value(drawn: list[tuple[int, float]], smallest: bool) -> None:
    group = np.array([g for g, _ in drawn])
    values = np.array([v for _, v in drawn], np.float32)
    ties = np.array([np.flatnonzero(group == g)[0] for g in group])
    merged = merge(ties, values, np.minimum if smallest else np.maximum)
    assert merged.dtype == np.float32
    for g in group:
        among = values[group == g]
        assert (merged[group == g] == (among.min() if smallest else among.max())).all()


def test_values_of_several_columns_are_merged_by_row() -> None:
    values = np.array([[1, 5], [2, 4], [3, 3]], np.float32)
    merged = merge(np.array([0, 1, 0]), values, np.add)
    assert merged.tolist() == [[4, 8], [2, 4], [4, 8]]


@given(st.data())
def test_channels_follow_a_reshape(data: st.DataObject) -> None:
    primes = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5))

    def grouped(label: str) -> list[int]:
        cuts = data.draw(st.lists(st.booleans(), min_size=len(primes), max_size=len(primes)), label)
        shape = [1]
        for prime, cut in zip(primes, cuts, strict=True):
            shape = [*shape, prime] if cut else [*shape[:-1], shape[-1] * prime]
        return shape

    after, before = grouped("after"), grouped("before")
    kept = [n if data.draw(st.booleans()) else 1 for n in after]
    channels = np.arange(math.prod(kept)).reshape(kept)
    found_ = reshaped(channels, after, before)
    assert found_ is not None
    wanted = np.broadcast_to(channels, after).reshape(before)
    assert np.array_equal(np.broadcast_to(found_, before), wanted)


@pytest.mark.parametrize(
    ("shape", "after", "before", "wanted"),
    [
        ([6], ["B", "S", 6], ["B", "S", 2, 3], [2, 3]),
        ([6], ["BS", 6], ["B", "S", 6], [6]),
        ([2, 1, 3], ["B", 2, "S", 3], ["B", 2, 1, "S", 3], [2, 1, 1, 3]),
        ([2, 1, 3], ["B", 2, "S", 3], ["B", 2, "T", 3], None),
        ([2, 1, 3], ["B", 2, "S", 3], ["B2", "S", 3], None),
        ([6], ["S", 6], ["6S"], None),
        ([6], [6], [], None),
    ],
    ids=str,
)
def test_named_axes_line_up_or_do_not(
    shape: list[int], after: list[int | str], before: list[int | str], wanted: list[int] | None
) -> None:
    result = reshaped(np.arange(math.prod(shape)).reshape(shape), after, before)
    assert (None if result is None else list(result.shape)) == wanted
