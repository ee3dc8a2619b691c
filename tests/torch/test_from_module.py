"""Tracing: what comes out computes the same, its layers have names, and failures name the layer."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qgraph.errors import ModelError
from qgraph.graph.reading import is_op, nodes
from qgraph.io.session import open_session, run
from qgraph.torch.from_module import trace


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.linear(x)) + x


class Tied(torch.nn.Module):
    """A language model in small: the head shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Any, scale: Any = None) -> Any:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = self.dropout(block(hidden))
        if scale is not None:
            hidden = hidden * scale
        return {"logits": self.head(hidden), "hidden": hidden}


def outputs(model: ir.Model, *inputs: Any) -> dict[str, np.ndarray]:
    feed = {v.name: x.numpy() for v, x in zip(model.graph.inputs, inputs, strict=True)}
    results = run(open_session(model), feed)  # type: ignore[arg-type]
    return {v.name: y for v, y in zip(model.graph.outputs, results, strict=True)}  # type: ignore[misc]


def close(ours: np.ndarray, theirs: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=tolerance, atol=tolerance)


def test_dynamic_shapes_hold_for_other_sizes() -> None:
    module = Tied().eval()
    ids = torch.randint(0, 16, (2, 5))
    model = trace(module, ids, {"ids": {0: "batch", 1: "sequence"}})
    assert [str(d) for d in model.graph.inputs[0].shape or ()] == ["batch", "sequence"]
    other = torch.randint(0, 16, (3, 9))
    found, wanted = outputs(model, other), module(other)
    assert list(found) == ["logits", "hidden"]
    close(found["logits"], wanted["logits"])
    close(found["hidden"], wanted["hidden"])


def test_an_example_of_batch_one_serves_for_a_dynamic_batch() -> None:
    module = Block().eval()
    model = trace(module, torch.zeros(1, 8), ({0: torch.export.Dim("batch")},))
    x = torch.randn(4, 8)
    close(outputs(model, x)["output"], module(x))


def test_axes_can_be_listed() -> None:
    model = trace(Block(), torch.zeros(2, 3, 8), {"x": [0, 1]})
    assert [str(d) for d in model.graph.inputs[0].shape or ()] == ["x_0", "x_1", "8"]


def test_example_inputs_by_name_come_in_any_order() -> None:
    module = Tied().eval()
    ids, scale = torch.randint(0, 16, (2, 5)), torch.tensor(0.5)
    model = trace(module, {"scale": scale, "ids": ids}, {"ids": {0: "batch"}})
    assert [v.name for v in model.graph.inputs] == ["ids", "scale"]
    close(outputs(model, ids, scale)["logits"], module(ids, scale)["logits"])


def test_arrays_serve_as_examples() -> None:
    model = trace(Block(), np.zeros((2, 8), np.float32))
    assert [v.name for v in model.graph.inputs] == ["x"]


@pytest.fixture(scope="module")
def tied() -> tuple[Any, ir.Model]:
    """A module and its trace, not to be changed."""
    module = Tied()
    return module, trace(module, torch.zeros(2, 5, dtype=torch.int64))


def test_nodes_are_named_by_module_path_and_are_unique(tied: tuple[Any, ir.Model]) -> None:
    _, model = tied
    names = [node.name for node in nodes(model)]
    assert len(set(names)) == len(names)
    assert {"embed/Gather", "blocks.0.linear/MatMul", "blocks.1.linear/MatMul", "head/MatMul"} <= {
        *names
    }


def test_a_module_called_twice_gives_two_names() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            return self.linear(torch.relu(self.linear(x)))

    names = [n.name for n in nodes(trace(Twice(), torch.zeros(2, 8))) if is_op(n, "Gemm")]
    assert names == ["linear/Gemm", "linear/Gemm_1"]


def test_provenance_stays_and_stack_traces_go(tied: tuple[Any, ir.Model]) -> None:
    _, model = tied
    assert not model.graph.metadata_props
    (head,) = [node for node in nodes(model) if node.name == "head/MatMul"]
    assert "head" in head.metadata_props["pkg.torch.onnx.name_scopes"]
    assert "fx_node" in " ".join(head.metadata_props)
    assert not any("stack_trace" in key for node in nodes(model) for key in node.metadata_props)


def test_what_was_captured_can_be_copied(tied: tuple[Any, ir.Model]) -> None:
    _, model = tied
    copied = model.clone(deep_copy=True)  # fake tensors of the captured program could not be
    assert [node.name for node in nodes(copied)] == [node.name for node in nodes(model)]


def test_tied_weights_are_held_once_and_never_copied(tied: tuple[Any, ir.Model]) -> None:
    module, model = tied
    weight = module.embed.weight.detach().numpy()
    shared = [
        value.name
        for value in model.graph.initializers.values()
        if value.const_value is not None and np.shares_memory(value.const_value.numpy(), weight)
    ]
    assert len(shared) == 2  # the table, and a transposed view of it for the head
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    assert size <= 2 * weight.nbytes + 2 * (8 * 8 + 8) * 4 + 256


class Pair(NamedTuple):
    first: Any
    second: Any


class Returns(torch.nn.Module):
    def __init__(self, build: Any) -> None:
        super().__init__()
        self.build = build

    def forward(self, x: Any) -> Any:
        return self.build(x)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda x: x + 1, ["output"]),
        (lambda x: (x + 1,), ["output"]),
        (lambda x: (x + 1, None, x + 2), ["output_0", "output_2"]),
        (lambda x: {"a": x + 1, "b": (x + 2, x + 3)}, ["a", "b_0", "b_1"]),
        (lambda x: Pair(x + 1, x + 2), ["first", "second"]),
        (lambda x: {"x": x * 2, "same": x}, ["x_1", "same"]),
        (lambda x: (x, x), ["output_0", "output_1"]),
    ],
)
def test_outputs_are_named_by_the_structure_returned(build: Any, names: list[str]) -> None:
    module = Returns(build).eval()
    x = torch.randn(2, 3)
    model = trace(module, x)
    assert [v.name for v in model.graph.inputs] == ["x"]
    found = outputs(model, x)
    assert list(found) == names
    leaves = [y for y in torch.utils._pytree.tree_leaves(module(x)) if y is not None]
    for ours, theirs in zip(found.values(), leaves, strict=True):
        close(ours, theirs)


def test_the_module_is_left_as_it_was() -> None:
    module = Tied().train()
    module.blocks[0].eval()
    before = copy.deepcopy(module.state_dict())
    model = trace(module, torch.zeros(2, 5, dtype=torch.int64))
    assert module.training
    assert not module.blocks[0].training
    assert module.head.training
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert not any(is_op(node, "Dropout") for node in nodes(model))
    module(torch.zeros(2, 5, dtype=torch.int64))["logits"].sum().backward()


def test_a_forward_of_the_instance_is_traced_and_stays() -> None:
    module = Block().eval()
    plain = module.forward

    def own(x: Any) -> Any:
        return plain(x) * 2

    module.forward = own  # type: ignore[method-assign]  # as hooks of accelerate do
    model = trace(module, torch.ones(2, 8))
    assert type(module) is Block
    assert module.forward is own
    assert "linear/Gemm" in {node.name for node in nodes(model)}
    close(outputs(model, torch.ones(2, 8))["output"], own(torch.ones(2, 8)))


class Branches(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x + 1 if x.sum() > 0 else x


class NotInOnnx(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.linalg.qr(x)[0]


class WrongShape(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x @ torch.ones(3, 3)


class Raises(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        raise ValueError("not today\nnor tomorrow")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Branches(), "depends on values"),
        (NotInOnnx(), "linalg_qr"),
        (WrongShape(), "must have same reduction dim"),
        (Raises(), "not today nor tomorrow"),
    ],
)
def test_a_failure_names_the_layer(
    bad: Any, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    module = torch.nn.Sequential(Block(), torch.nn.Sequential(torch.nn.ReLU(), bad)).train()
    with pytest.raises(ModelError, match=r"layer '1\.1'") as caught:
        trace(module, torch.zeros(8, 8))
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    assert module.training
    assert capfd.readouterr() == ("", "")


class Steps(torch.nn.Module):
    """A loop over time, which a trace unrolls."""

    def forward(self, x: Any) -> Any:
        state = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):
            state = torch.tanh(state + x[:, step])
        return state


@pytest.mark.parametrize("name", ["time", torch.export.Dim("time")])
def test_an_axis_that_cannot_be_free_is_told(name: Any) -> None:
    with pytest.raises(ModelError, match="axis 1 of 'x' free: its code fixes it") as caught:
        trace(Steps(), torch.zeros(2, 5, 3), {"x": {0: "batch", 1: name}})
    assert "leave that axis out of dynamic_shapes" in str(caught.value)
    assert "\n" not in str(caught.value)
    model = trace(Steps(), torch.zeros(2, 5, 3), {"x": {0: "batch"}})
    assert [str(d) for d in model.graph.inputs[0].shape or ()] == ["batch", "5", "3"]


def test_a_decision_by_values_is_told_with_its_line() -> None:
    with pytest.raises(ModelError) as caught:
        trace(Branches(), torch.zeros(8, 8))
    assert "test_from_module.py:" in str(caught.value)
    assert "(return x + 1 if x.sum() > 0 else x), use torch.where" in str(caught.value)


def test_a_mask_that_torch_looks_into_is_told() -> None:
    layer = torch.nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    module = torch.nn.TransformerDecoder(layer, 1)
    x, memory = torch.zeros(2, 6, 8), torch.zeros(2, 7, 8)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(6)
    example = {"tgt": x, "memory": memory, "tgt_mask": mask}
    with pytest.raises(ModelError, match=r"transformer.py:\d+ .* give is_causal \(tgt_is_causal"):
        trace(module, example)
    trace(module, {**example, "tgt_is_causal": True})


class Variadic(torch.nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(x * 2 for x in (*args, *kwargs.values()))


@pytest.mark.parametrize(
    ("example", "shapes"),
    [
        ((0, 0), ({0: "b"},)),
        ((0, 0), ({0: "b"}, {0: "b"})),
        ((0, 0), ([0],)),
        ((0, 0), (({0: "b"}, None),)),
        ((0, 0), {"args": ({0: "b"}, {0: "b"})}),
        ((0, 0), {"args_0": {0: "b"}, "args_1": {0: "b"}}),
        ({"x": 0, "y": 0}, {"x": {0: "b"}}),
        ({"x": 0, "y": 0}, {"kwargs": {"x": {0: "b"}, "y": None}}),
        ({"x": 0, "y": 0}, ({0: "b"}, {0: "b"})),
    ],
)
def test_axes_of_variadic_arguments(example: Any, shapes: Any) -> None:
    tensors: Any = (torch.zeros(3, 4), torch.zeros(3, 4))
    if isinstance(example, dict):
        tensors = dict(zip(example, tensors, strict=True))
    model = trace(Variadic(), tensors, shapes)
    first = [v.shape[0] for v in model.graph.inputs if v.shape is not None]
    assert isinstance(first[0], ir.SymbolicDim)
    several = str(shapes).count("{0") > 1
    assert isinstance(first[1], ir.SymbolicDim) == several


def test_too_many_axes_for_variadic_arguments_are_told() -> None:
    two = (torch.zeros(3), torch.zeros(3))
    with pytest.raises(ModelError, match="3 entries for 2 inputs"):
        trace(Variadic(), two, ({0: "b"},) * 3)
    with pytest.raises(ModelError, match="names 'x', which is no input: use args_0, args_1"):
        trace(Variadic(), two, {"x": {0: "b"}})


@pytest.mark.parametrize(
    ("example", "shapes", "message"),
    [
        ((), None, "missing a required argument: 'ids'"),
        ({"idz": torch.zeros(2, 5)}, None, "example_inputs do not fit Tied.forward"),
        (
            torch.zeros(2, 5, dtype=torch.int64),
            {"idz": {0: "b"}},
            "'idz', which is no input: use ids",
        ),
        (torch.zeros(2, 5, dtype=torch.int64), (None, None), "2 entries for 1 inputs"),
    ],
)
def test_bad_arguments_are_told_in_one_line(example: Any, shapes: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        trace(Tied(), example, shapes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_torch_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from qgraph.errors import ModelError\nfrom qgraph.torch.from_module import trace\n"
        "try:\n    trace(None, None)\nexcept ModelError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'tracing needs torch: pip install "qgraph-compiler[torch]"\n'


@pytest.mark.slow
def test_efficientnet_agrees_with_torch() -> None:
    from benchmarks import zoo

    module, (example,) = zoo.efficientnet_lite0_module()
    model = trace(module, example, ({0: "batch"},))
    x = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(outputs(model, x)["output"], module(x), 1e-4)


@pytest.mark.slow
def test_minilm_agrees_with_torch() -> None:
    from benchmarks import zoo

    module, example, shapes = zoo.minilm_module()
    model = trace(module, example, shapes)
    ids = torch.randint(0, 30000, (3, 33), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with torch.no_grad():
        close(outputs(model, ids, mask)["output"], module(ids, mask), 1e-4)
    names = {node.name for node in nodes(model)}
    assert "encoder.encoder.layer.0.attention.self.query/MatMul" in names
