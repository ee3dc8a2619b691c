"""Models that do not say what they mean: one line that tells what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnx.helper import make_attribute, make_node, make_tensor

from qgraph.errors import ModelError
from qgraph.io import soundness
from qgraph.io.models import load
from tests.models import if_model, outputs

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,4] x) => (float[N,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}> {
  a = Relu (x)
  b = MatMul (a, w)
  y = Softmax <axis = 1> (b)
}"""
Damage = Callable[[onnx.GraphProto], object]


def damaged(damage: Damage, folder: Path, text: str = TEXT) -> Path:
    model = onnx.parser.parse_model(text)
    damage(model.graph)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def _cycle(graph: onnx.GraphProto) -> None:
    graph.node[0].input[0] = "b"


def _raw(data: bytes) -> Damage:
    def damage(graph: onnx.GraphProto) -> None:
        graph.initializer[0].ClearField("float_data")
        graph.initializer[0].raw_data = data

    return damage


DAMAGES: dict[str, Damage] = {
    "nodes wait for each other": _cycle,
    "MatMul 'b': its input 'v' comes from nowhere": lambda g: g.node[1].input.__setitem__(1, "v"),
    "output 'y' comes from nowhere": lambda g: g.node[2].output.__setitem__(0, "z"),
    "there is another 'a', its output": lambda g: g.node[1].output.__setitem__(0, "a"),
    "there is another 'x', its output": lambda g: g.node[1].output.__setitem__(0, "x"),
    "two inputs are called 'x'": lambda g: g.input.append(g.input[0]),
    r"MatMul 'b': its input 1 \('B'\) is missing": lambda g: g.node[1].input.pop(),
    r"its input 0 \('X'\) is missing": lambda g: g.node[0].input.__setitem__(0, ""),
    "3 inputs, the operator has at most 2": lambda g: g.node[1].input.append("w"),
    "its attribute 'axis' is float, not int": lambda g: g.node[2].attribute[0].CopyFrom(
        make_attribute("axis", 1.0)
    ),
    "its attribute 'axis' is undefined, not int": lambda g: setattr(
        g.node[2].attribute[0], "type", 0
    ),
    "Cast 'c': its attribute 'to' is missing": lambda g: g.node.append(
        make_node("Cast", ["x"], ["c"])
    ),
    "holds 7 numbers, its shape .4, 2. needs 8": lambda g: g.initializer[0].float_data.pop(),
    "holds 5 bytes, its shape .4, 2. needs 32": _raw(b"12345"),
    "has a negative size": lambda g: g.initializer[0].dims.__setitem__(0, -4),
    "holds 8 numbers, .* needs 9223372036854775808": lambda g: g.initializer[0].dims.__setitem__(
        0, 1 << 62
    ),
    "no element type that is known .0.": lambda g: setattr(g.initializer[0], "data_type", 0),
    "no element type that is known .99.": lambda g: setattr(g.initializer[0], "data_type", 99),
    "input 'x' has no element type": lambda g: setattr(
        g.input[0].type.tensor_type, "elem_type", 0
    ),
    "says that its data is in a file, but not in which": lambda g: setattr(
        g.initializer[0], "data_location", TensorProto.EXTERNAL
    ),
    "attribute 'value' holds 1 numbers": lambda g: g.node.append(
        make_node("Constant", [], ["c"], value=TensorProto(dims=[2], data_type=1, float_data=[1]))
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", DAMAGES)
def test_what_is_wrong_is_said_in_one_line(reason: str, tmp_path: Path) -> None:
    path = damaged(DAMAGES[reason], tmp_path)
    with pytest.raises(ModelError, match=reason) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_bodies_are_looked_at_too(tmp_path: Path) -> None:
    ir.save(if_model(), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    branch = next(n for n in proto.graph.node if n.op_type == "If").attribute[0].g
    branch.node[0].input[0] = "nowhere"
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="its input 'nowhere' comes from nowhere"):
        load(tmp_path / "m.onnx")


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    def reverse(graph: onnx.GraphProto) -> None:
        nodes = list(graph.node)[::-1]
        del graph.node[:]
        graph.node.extend(nodes)

    x = np.eye(4, dtype=np.float32)
    mixed, sound = load(damaged(reverse, tmp_path)), load(damaged(lambda g: None, tmp_path))
    assert [node.op_type for node in mixed.graph] == ["Relu", "MatMul", "Softmax"]
    np.testing.assert_array_equal(outputs(mixed, {"x": x}), outputs(sound, {"x": x}))


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("Softmax <axis = 1>", "SimplifiedLayerNormalization"),  # of onnxruntime
        TEXT.replace('"" : 21', '"" : 999'),  # of a version to come
        TEXT.replace("Relu (x)", "Clip (x, , )"),
    ],
)
def test_what_onnx_does_not_know_is_let_through(text: str, tmp_path: Path) -> None:
    assert len(load(damaged(lambda g: None, tmp_path, text)).graph) == 3


@pytest.mark.parametrize("kind", [k for k in TensorProto.DataType.values() if k not in (0, 8)])
@pytest.mark.parametrize("raw", [True, False])
def test_data_of_every_type_is_measured(kind: int, raw: bool, tmp_path: Path) -> None:
    try:
        tensor = make_tensor("w", kind, [3, 3], np.ones(9))
    except (KeyError, ValueError, TypeError, NotImplementedError):
        pytest.skip("onnx makes no such tensor")
    if raw:
        tensor = make_tensor(
            "w", kind, [3, 3], ir.serde.TensorProtoTensor(tensor).tobytes(), raw=True
        )
    found, wanted = soundness._lengths(tensor)
    assert found == wanted
