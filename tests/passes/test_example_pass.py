"""The documented example of a user's own pass: it does what it says, from Python and as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qgraph
from examples.keep_sensitive import KeepSensitive, rounding_sqnr_db
from qgraph import PerAxis, QuantSpec
from qgraph.backends import get_target
from qgraph.errors import PipelineError
from qgraph.graph.reading import array
from qgraph.numerics.noise import sqnr_db
from qgraph.passes import all_passes
from qgraph.pipeline.parse import parse
from qgraph.recipes.eight_bits import dynamic
from tests import models

ROOT = Path(__file__).parents[2]
INT4 = '"int8:4 per-axis(0) sym absmax"'


def one_bad_layer(seed: int = 0) -> ir.Model:
    """An MLP whose second layer has one large weight in every channel."""
    model = models.mlp((32, 64, 64, 16), seed=seed)
    value = model.graph.initializers["w1"]
    weight = np.array(array(value))
    weight[np.random.default_rng(seed).integers(0, 64, 64), np.arange(64)] = 8 * weight.std()
    value.const_value = ir.Tensor(weight, name="w1")
    return model


@given(
    seed=st.integers(0, 999),
    bits=st.integers(2, 7),
    axis=st.integers(0, 1),
    factor=st.floats(1e-3, 1e3),
)
def test_more_bits_keep_more_and_the_unit_does_not_matter(
    seed: int, bits: int, axis: int, factor: float
) -> None:
    weight = np.random.default_rng(seed).standard_normal((24, 16)).astype(np.float32)
    spec = QuantSpec(granularity=PerAxis(axis), bits=bits)
    kept = rounding_sqnr_db(weight, spec)
    assert rounding_sqnr_db(weight, spec.with_(bits=bits + 1)) > kept
    assert rounding_sqnr_db(weight * np.float32(factor), spec) == pytest.approx(kept, abs=0.5)


def test_a_weight_of_zeros_loses_nothing() -> None:
    assert rounding_sqnr_db(np.zeros((4, 3), np.float32), QuantSpec()) == float("inf")


def test_only_the_bad_layer_stays_float() -> None:
    passes = parse(f"canonicalize,annotate{{weight={INT4}}}", all_passes())
    context = qgraph.Context(get_target("onnx"))
    model = one_bad_layer()
    qgraph.PassManager([*passes, KeepSensitive(min_sqnr=15)], verify=True).run(model, context)
    assert [r.kind for r in context.remarks.verdicts().values()] == [
        "quantized",
        "float",
        "quantized",
    ]
    assert "less than 15 dB" in context.remarks[-1].message


def test_it_makes_four_bits_better_inside_a_recipe() -> None:
    model = one_bad_layer()
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    (reference,) = models.outputs(model, {"x": x})

    def quality(recipe: qgraph.Recipe) -> float:
        compiled = qgraph.compile(model, recipe, target="onnx", verify=True)
        return float(sqnr_db(reference, compiled(x)))

    plain = dynamic(bits=4)
    assert quality(plain.insert(KeepSensitive(15), before="insert-qdq")) > quality(plain) + 3


def test_it_runs_in_a_pipeline_written_as_text() -> None:
    own = "examples.keep_sensitive:KeepSensitive{min_sqnr=15.0}"
    text = f"canonicalize,annotate{{weight={INT4}}},{own},insert-qdq,fold-qdq,lower"
    pipeline = qgraph.PassManager(parse(text, all_passes()), verify=True)
    assert str(pipeline) == text
    context = qgraph.Context(get_target("onnx"))
    assert pipeline.run(one_bad_layer(), context)
    assert [r.kind for r in context.remarks.verdicts().values()].count("float") == 1


def test_its_place_in_the_pipeline_is_checked() -> None:
    with pytest.raises(PipelineError, match="'keep-sensitive' needs a model that is annotated"):
        qgraph.PassManager([KeepSensitive()])
