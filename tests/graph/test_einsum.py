"""Einsum with a constant operand: which are products of matrices and compute the same as those."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.graph.einsum import plain_einsum, product_of
from qgraph.graph.sites import sites
from qgraph.graph.types import infer_types
from tests.models import build, feed, ops, outputs, weight

SIZES = dict(zip("abcdefgh", (2, 3, 4, 5, 2, 3, 4, 3), strict=True))


def einsum(equation: str, data: list[object], w: tuple[int, ...], w_index: int = 1) -> ir.Model:
    """A model of one Einsum of `x` and a constant `w`."""
    names = ["w", "x"] if w_index == 0 else ["x", "w"]
    shape = ",".join(map(str, data))
    return build(
        f'f (float[{shape}] x) => (float[] y) {{ y = Einsum <equation = "{equation}"> '
        f"({', '.join(names)}) }}",
        weight("w", *w),
    )


def same_after(model: ir.Model) -> ir.Model:
    """The model rewritten, checked to compute the same, the shape of the result included."""
    given_ = feed(model)
    before = outputs(model, given_)
    assert plain_einsum(model, model.graph.node(0))
    infer_types(model)
    (after,) = outputs(model, given_)
    np.testing.assert_allclose(after, before[0], rtol=1e-5, atol=1e-5)
    return model


@pytest.mark.parametrize(
    ("equation", "data", "w", "expected"),
    [
        ("bte,ef->btf", ["b", "t", 4], (4, 5), "MatMul"),
        ("...e,ef", ["b", "t", 4], (4, 5), "MatMul"),
        ("... e, f e -> ... f", ["b", "t", 4], (5, 4), "MatMul"),
        ("bte,ehd->bthd", ["b", "t", 8], (8, 2, 3), "MatMul Reshape"),
        ("bte,ehd->bhtd", ["b", "t", 8], (8, 2, 3), "MatMul Reshape Transpose"),
        ("bthd,hde->bte", ["b", "t", 2, 3], (2, 3, 5), "Reshape MatMul"),
        ("bhte,hed->bhtd", ["b", 2, "t", 4], (2, 4, 3), "MatMul"),
        ("bhe,hed->bhd", ["b", 2, 4], (2, 4, 3), "Transpose MatMul Transpose"),
        ("he,hed->hd", [2, 4], (2, 4, 3), "Reshape MatMul Reshape"),
        ("hbte,hed->hbtd", [2, "b", "t", 4], (2, 4, 3), "MatMul"),
        ("bchw,co->bohw", ["b", 3, "h", "w"], (3, 5), "Transpose MatMul Transpose"),
        ("e,ef->f", [4], (4, 5), "MatMul"),
        ("bte,e->bt", ["b", "t", 4], (4,), "MatMul Reshape"),
        ("te,te->", [3, 4], (3, 4), "Reshape MatMul Reshape"),
    ],
)
def test_golden_forms(equation: str, data: list[object], w: tuple[int, ...], expected: str) -> None:
    model = same_after(einsum(equation, data, w))
    assert " ".join(ops(model)) == expected
    (site,) = sites(model)
    assert site.kind == ("matmul" if len(site.weight.shape or ()) == 2 else "activations")


def test_a_constant_may_come_first_and_the_name_stays() -> None:
    model = einsum("oi,bis->bos", ["b", 4, "s"], (5, 4), w_index=0)
    model.graph.node(0).name = "layer/Einsum"
    same_after(model)
    assert [n.name for n in model.graph if n.op_type == "MatMul"] == ["layer/Einsum"]
    assert len({n.name for n in model.graph}) == len(model.graph)


@pytest.mark.parametrize(
    ("equation", "data", "w", "why"),
    [
        ("bi,bj->bij", [2, 3], (2, 4), "it multiplies without summing"),
        ("bii,ij->bj", ["b", 3, 3], (3, 4), "it takes a diagonal"),
        ("bsi,ij->bj", ["b", 5, 3], (3, 4), "it sums axis 's', which only one of its operands has"),
        ("bi,ij->bj", ["b", "i"], (3, 4), "the sizes of the axes that its operands share"),
    ],
)
def test_what_is_no_product_stays_with_a_reason(
    equation: str, data: list[object], w: tuple[int, ...], why: str
) -> None:
    model = einsum(equation, data, w)
    assert not plain_einsum(model, model.graph.node(0))
    found = product_of(model.graph.node(0))
    assert isinstance(found, str)
    assert why in found


def test_two_computed_operands_stay() -> None:
    text = 'f (float[b,t,4] x) => (float[] y) { y = Einsum <equation = "bte,bse->bts"> (x, x) }'
    model = build(text)
    assert not plain_einsum(model, model.graph.node(0))


@st.composite
def equations(draw: st.DrawFn) -> ir.Model:
    """Operands that share some letters in any order, and a result of some of theirs."""
    letters = draw(st.lists(st.sampled_from(sorted(SIZES)), min_size=2, max_size=6, unique=True))
    shared = draw(st.integers(0, min(3, len(letters))))
    cut = draw(st.integers(max(shared, 1), len(letters) - (not shared)))
    data = draw(st.permutations(letters[:cut]))
    w = draw(st.permutations(letters[:shared] + letters[cut:]))
    least = letters[shared:] if draw(st.integers(0, 3)) else []  # else some are summed, perhaps
    more = draw(st.lists(st.sampled_from(letters), max_size=3))
    kept = draw(st.permutations(sorted({*least, *more})))
    w_index = draw(st.integers(0, 1))
    terms = [data, w] if w_index else [w, data]
    dots = draw(st.sampled_from(("", "", "...")))
    equation = ",".join((dots if term is data else "") + "".join(term) for term in terms) + draw(
        st.sampled_from((f"->{dots}{''.join(kept)}", ""))
    )
    hidden: list[object] = ["n", 2] if dots else []
    free = [SIZES[a] if a in w else draw(st.sampled_from((SIZES[a], a))) for a in data]
    return einsum(equation, [*hidden, *free], tuple(SIZES[a] for a in w), w_index)


@given(model=equations())
@settings(max_examples=150, deadline=None)
def test_any_equation_is_the_same_product_or_has_a_reason(model: ir.Model) -> None:
    if isinstance(why := product_of(model.graph.node(0)), str):
        assert why
        return
    same_after(model)
