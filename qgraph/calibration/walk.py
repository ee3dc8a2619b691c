"""Run calibration data through a model piece by piece, for methods that rewrite it on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qgraph.errors import CalibrationError
from qgraph.graph.cuts import Piece, cut
from qgraph.io.feeds import Feed
from qgraph.io.kv_cache import Completer
from qgraph.io.session import open_session


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
        complete = Completer(model)
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
        outputs = [values[stop] for values in self.carried]
        for values in self.carried:
            for value in piece.spent:
                values.pop(str(value.name), None)
        self.at += 1
        return outputs

    def go_to(self, piece: int) -> None:
        """Run all pieces before this one.

        Raises:
            CalibrationError: the model does not run on the feeds.
        """
        while self.at < piece:
            self.advance()

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
