"""Run calibration data through a model piece by piece, for methods that rewrite it on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.analysis import analyze_implicit_usage

from qgraph.context import Feed
from qgraph.errors import CalibrationError
from qgraph.kv_cache import completer
from qgraph.session import open_session

Captured = Mapping[ir.Graph, set[ir.Value]]


@dataclass(frozen=True)
class Piece:
    """A part of a graph, bounded by values.

    Attributes:
        stop: the value it is run for.
        inputs: values it reads that are computed before it, or fed.
        outputs: values it computes that later pieces read, and `stop` if that is one of them.
        spent: values that no later piece reads.
        nodes: what it runs, in no order.
    """

    stop: ir.Value
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    spent: tuple[ir.Value, ...]
    nodes: frozenset[ir.Node] = frozenset()


def cut(model: ir.Model, stops: Sequence[ir.Value]) -> list[Piece]:
    """Cut the main graph into pieces, each of which computes what the next stop needs.

    ::

        x ── A ── stop 0 ── B ─┬─ C ── stop 1 ── D ─┬─ stop 2      pieces: A | B, C | E, D
                               └──── E ─────────────┘              carried past stop 1: B's result

    Any graph can be cut, and each node runs once. Where the graph is narrow, few values are carried
    from piece to piece. What follows from constants alone is computed by each piece that reads it.

    Args:
        stops: values of the main graph; none of them needs a later one.
    """
    captured = analyze_implicit_usage(model.graph)
    changing = _changing(model.graph, captured)
    owner: dict[ir.Node, int] = {}
    owned: list[set[ir.Node]] = [set() for _ in stops]
    reads: list[dict[ir.Value, None]] = []
    last: dict[ir.Value, int] = {}
    for index, stop in enumerate(stops):
        read, stack = {stop: None}, [stop]
        while stack:
            node = stack.pop().producer()
            if node is None or node in owner:
                continue
            owner[node] = index
            owned[index].add(node)
            needed = [v for v in inputs_of(node, captured) if v in changing]
            read |= dict.fromkeys(needed)
            stack += needed
        reads.append(read)
        last |= dict.fromkeys(read, index)

    def made(value: ir.Value) -> int:
        node = value.producer()
        return -1 if node is None else owner[node]

    pieces = []
    for index, (stop, read) in enumerate(zip(stops, reads, strict=True)):
        outputs = [v for v in last if made(v) == index and (last[v] > index or v is stop)]
        spent = [v for v in last if last[v] == index and (made(v) < index or v is stop)]
        inputs = [v for v in read if made(v) < index]
        bounds = tuple(inputs), tuple(outputs), tuple(spent)
        pieces.append(Piece(stop, *bounds, frozenset(owned[index])))
    return pieces


def inputs_of(node: ir.Node, captured: Captured) -> list[ir.Value]:
    """What a node reads, the bodies of control flow in it included."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found += captured.get(attribute.as_graph(), ())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += [v for graph in attribute.as_graphs() for v in captured.get(graph, ())]
    return found


def _changing(graph: ir.Graph, captured: Captured) -> set[ir.Value]:
    """The values that depend on what is fed."""
    found = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        if any(value in found for value in inputs_of(node, captured)):
            found.update(node.outputs)
    return found


class Walk:
    """Feeds on their way through the pieces of a model, all of them at the same stop.

    The model may be rewritten on the way, as long as its values keep their names and stay where
    they are: a piece is run as it is when its turn comes.

    Attributes:
        at: number of the next piece.
        carried: for each feed, the values that are still needed, by name.
    """

    def __init__(self, model: ir.Model, stops: Sequence[str], feeds: Iterable[Feed]) -> None:
        """
        Args:
            stops: names of values of the main graph; none of them needs a later one.
        """
        named = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
        complete = completer(model)
        self.model, self.pieces, self.at = model, cut(model, [named[stop] for stop in stops]), 0
        known = {value.name for piece in self.pieces for value in piece.inputs}
        self.carried: list[dict[str, np.ndarray]] = [
            {name: data for name, data in complete(feed).items() if name in known} for feed in feeds
        ]

    def advance(self) -> list[np.ndarray]:
        """Run the next piece, and let go of what no later piece needs.

        Returns:
            for each feed, the value that the piece stops at.

        Raises:
            CalibrationError: the model does not run on the feeds.
        """
        piece = self.pieces[self.at]
        if piece.outputs and self.carried:
            self._run(piece)
        stop = str(piece.stop.name)
        found = [values[stop] for values in self.carried]
        for values in self.carried:
            for value in piece.spent:
                values.pop(str(value.name), None)
        self.at += 1
        return found

    def state(self) -> dict[str, np.ndarray]:
        """Where the walk is, for :meth:`resume`."""
        return {
            f"{index}|{name}": data
            for index, values in enumerate(self.carried)
            for name, data in values.items()
        }

    def resume(self, at: int, state: Mapping[str, np.ndarray]) -> None:
        """Be where another walk through the same pieces was when its next piece was `at`."""
        self.at = at
        for values in self.carried:
            values.clear()
        for key, data in state.items():
            index, _, name = key.partition("|")
            self.carried[int(index)][name] = data

    def _run(self, piece: Piece) -> None:
        session = open_session(self.extracted(piece))
        reads, writes = ([str(v.name) for v in part] for part in (piece.inputs, piece.outputs))
        gone = {str(v.name) for v in piece.spent if v is not piece.stop}
        for index, values in enumerate(self.carried):
            try:
                results = session.run(writes, {name: values[name] for name in reads})
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise CalibrationError(
                    f"the model does not run on calibration feed {index}: {reason}"
                ) from error
            for name in gone:
                values.pop(name, None)
            values.update(zip(writes, results, strict=True))

    def extracted(self, piece: Piece, weights: Sequence[ir.Value] = ()) -> ir.Model:
        """The piece as a model of its own.

        Args:
            weights: constants that become inputs, behind the others.
        """
        graph = ir.convenience.extract(self.model.graph, [*piece.inputs, *weights], piece.outputs)
        for value in weights:
            graph.initializers.pop(str(value.name), None)
        for value in graph.inputs[: len(piece.inputs)]:
            # Exporters need not say what type a value in the middle has.
            dtype = self.carried[0][str(value.name)].dtype
            value.type = ir.TensorType(ir.DataType.from_numpy(dtype))
        part = ir.Model(graph, ir_version=self.model.ir_version)
        part.opset_imports.update(self.model.opset_imports)
        part.functions.update({key: f.clone() for key, f in self.model.functions.items()})
        return part
