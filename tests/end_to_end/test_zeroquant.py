"""The recipe `zeroquant`: what its parameters do, and what it makes of real models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from benchmarks import tasks, zoo
from qgraph.errors import QGraphError
from qgraph.graph.mlp import in_mlp
from qgraph.graph.sites import sites
from qgraph.io.models import load
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.spec import WEIGHT, PerAxis, PerBlock, QuantSpec
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.distill import Distill
from qgraph.passes.smooth import Smooth
from qgraph.pipeline.context import Context
from qgraph.pipeline.target import Target
from qgraph.recipes import get_recipe
from qgraph.recipes.transformers import zeroquant
from tests.models import feed, outputs, transformer_block
from tests.pipelines import CPU, ONNX, TARGETS, apply, both, specs

IN_64 = QuantSpec(ir.DataType.INT4, PerBlock(0, 64), observer="absmax")


def weights(**parameters: object) -> dict[str, str]:
    """The spec of each product's weight in a transformer block on `cpu`, by its name."""
    model = transformer_block()
    recipe = get_recipe("zeroquant", {"alpha": 0.0, **parameters})
    (annotate,) = (p for p in recipe.passes if isinstance(p, Annotate))
    apply(model, (Canonicalize(), annotate), target=CPU)
    return {name: found[1] for name, found in specs(model).items()}


def test_bits_of_mlps_and_of_all_others() -> None:
    eight, four = str(WEIGHT.with_(granularity=PerAxis(1))), str(IN_64)
    attention, mlp = ("k", "o", "q", "v"), ("down", "gate", "up")
    assert set(weights().values()) == {eight}
    found = weights(mlp_bits=4)
    assert {found[name] for name in attention} == {eight}
    assert {found[name] for name in mlp} == {four}
    found = weights(bits=4, mlp_bits=8)
    assert {found[name] for name in attention} == {four}
    assert {found[name] for name in mlp} == {eight}
    assert set(weights(bits=4).values()) == {four}


def test_groups() -> None:
    in_32 = str(IN_64.with_(granularity=PerBlock(0, 32)))
    assert set(weights(bits=4, group_size=32).values()) == {in_32}
    whole = IN_64.with_(granularity=PerAxis(1))
    assert set(weights(bits=4, group_size=0).values()) == {str(whole)}
    assert set(weights(bits=3).values()) == {str(IN_64.with_(bits=3))}
    six = IN_64.with_(dtype=ir.DataType.INT8, bits=6)
    assert set(weights(bits=6).values()) == {str(six)}


def test_rules_come_first() -> None:
    rule = Rule(("matmul",), None, layers="gate")
    assert "gate" not in weights(mlp_bits=4, rules=(rule,))


def test_passes_for_its_parameters() -> None:
    plain = zeroquant(alpha=0.0)
    assert not plain.calibrates
    assert not any(isinstance(p, Smooth | Distill) for p in plain.passes)
    learned = zeroquant(alpha=0.0, lkd=True)
    assert learned.calibrates
    names = [p.name for p in learned.passes]
    assert names.index("balance-tables") < names.index("distill") < names.index("insert-qdq")
    smoothed = zeroquant(alpha=0.6)
    assert smoothed.calibrates
    assert Smooth(0.6) in smoothed.passes


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"bits": 1}, "bits=1 is out of range"),
        ({"mlp_bits": 9}, "bits=9 is out of range: use 2 to 8"),
        ({"group_size": 8}, "group_size=8 is out of range: use 0"),
        ({"group_size": -64}, "group_size=-64 is out of range"),
        ({"group_size": "many"}, "group_size=many is out of range"),
        ({"alpha": 2.0}, "alpha=2.0 is out of range"),
    ],
)
def test_bad_parameters(parameters: dict[str, object], why: str) -> None:
    with pytest.raises(QGraphError, match=why):
        get_recipe("zeroquant", parameters)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize(("parameters", "least"), [({}, 30), ({"mlp_bits": 4}, 16)], ids=str)
def test_a_transformer(target: Target, parameters: dict[str, int], least: float) -> None:
    model = transformer_block(width=64)
    given = feed(model)
    wanted = outputs(model, given)[0]
    apply(model, get_recipe("zeroquant", dict(parameters)).passes, [given], target)
    assert sqnr_db(wanted, both(model, given)[0]) > least


# --- real models ----------------------------------------------------------------------------------


def products(model: ir.Model) -> Counter[bool]:
    """How many products of the model are in MLPs, and how many are not."""
    Canonicalize().run(model, Context(ONNX))
    return Counter(in_mlp(site) for site in sites(model) if site.kind in ("matmul", "gemm"))


@pytest.mark.slow
def test_mlps_of_real_models() -> None:
    assert products(load(zoo.smollm2_genai())) == {True: 90, False: 61}
    assert products(load(zoo.minilm_onnx())) == {True: 12, False: 24}


@pytest.mark.slow
def test_mlps_of_a_traced_llama() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval()
    model = qgraph.trace(module, (torch.arange(8)[None],))
    assert products(model) == {True: 6, False: 9}


@pytest.mark.slow
@pytest.mark.parametrize("lkd", [False, True], ids=["", "lkd"])
def test_smollm2_with_4_bits_in_its_mlps(lkd: bool, tmp_path: Path) -> None:
    """4 bits on disk, run by the int8 kernels, the same integers at both optimization levels."""
    generation = pytest.importorskip("benchmarks.generation")
    source = zoo.smollm2_genai()
    data = tasks.smollm2_calibration(source, 2, 512)
    compiled = qgraph.compile(source, "zeroquant", data, mlp_bits=4, lkd=lkd)
    out = compiled.save(tmp_path / "out")
    messages = Counter(r.message for r in compiled.remarks.verdicts().values() if r.op == "MatMul")
    four = sum(count for text, count in messages.items() if "int4 in blocks of 64" in text)
    assert (four, messages.total()) == (90, 151)

    sizes = [sum(f.stat().st_size for f in Path(p).glob("*.onnx*")) for p in (source, out)]
    assert sizes[1] <= 0.2 * sizes[0]

    chunks = tasks.smollm2_chunks(n=2, length=256)
    plain, optimized = (tasks.session(out, optimized=level, threads=2) for level in (False, True))
    few = {"input_ids": chunks[:1, :64]}
    for a, b in zip(plain(few), optimized(few), strict=True):
        np.testing.assert_array_equal(a, b)
    float_one = tasks.perplexity(tasks.session(source, threads=2), chunks)
    loss = tasks.perplexity(optimized, chunks) / float_one
    assert loss < (1.3 if lkd else 1.4)
    generation.same_tokens(source, out, 2)  # it loads and generates; how alike: the benchmark
