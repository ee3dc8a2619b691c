"""Put the weights of a quantized Hugging Face checkpoint into a graph of the same model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.errors import ModelError, QGraphError
from qgraph.graph.annotation import Stage, set_integers
from qgraph.graph.editing import add_constant, computed, insert, remove_dead, typed
from qgraph.graph.ops import FLOATS, NORMS
from qgraph.graph.provenance import modules
from qgraph.graph.reading import (
    array,
    constant,
    constant_array,
    constant_tensor,
    dims,
    input_of,
    release,
)
from qgraph.graph.sites import Site, site_of
from qgraph.io.checkpoints.checkpoint import Checkpoint
from qgraph.io.checkpoints.names import aligned, parts_of
from qgraph.io.checkpoints.packed_layers import Layer, joined
from qgraph.io.checkpoints.resemblance import check_alike, misfit, near, tied, unlike
from qgraph.numerics.reference import Float
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass

ONE_MORE = (
    "gemma",
    "nemotron",
    "qwen3_5",
    "qwen3_next",
    "recurrent_gemma",
    "t5gemma",
    "vaultgemma",
)
"""Families of models whose norms multiply by one more than their weight."""
_SCALES = {
    "Mul": (0, 1),
    **{norm: inputs[:1] for norm, inputs in NORMS.items()},
}
_SHIFTS = {
    "Add": (0, 1),
    "Gemm": (2,),
    "Conv": (2,),
    **{norm: inputs[1:] for norm, inputs in NORMS.items()},
}
"""Which inputs of an operator hold what a module calls its weight, and its bias."""


@dataclass(frozen=True)
class LoadCheckpoint(Pass):
    """Replace the weights of a float graph by those of a checkpoint, integers kept as they are.

    The problem: GPTQ, AWQ and bitsandbytes write packed integers for layers that they know by
    name; a graph has float matrices for products, and its exporter has renamed, transposed and
    concatenated them::

        model.layers.0.self_attn.q_proj.qweight, .qzeros, .scales
                                 k_proj, v_proj ...                      x ── MatMul ── y
                                                                   q | k | v ──┘

    A layer's products are those that its module computes: traced nodes remember their module,
    builders name their nodes by it. Products that a builder has packed take several layers, side by
    side. The weight becomes a constant of the float values with its integers beside it, which
    insert-qdq writes unchanged; annotate gives such a weight no other spec than its own. Other
    tensors of the checkpoint (norms, embeddings, biases, float layers) are taken as they are.

    Rows that GPTQ has put into another order ("act-order") keep it, since only so do groups lie in
    one piece; the data is brought into the same order by a Gather, once for all that read it.

    Parameters:
        path: the folder with `config.json` and safetensors files.
        check: the graph holds the float weights of the same model: matrices must resemble them, but
            for factors of rows and columns, which AWQ moves between layers. Layers that the
            checkpoint does not have stay. Without it the graph's weights mean nothing (a skeleton
            with random ones), and every product must be in the checkpoint.

    Source: the formats named in :mod:`qgraph.io.checkpoints.packed_layers`.
    """

    name: ClassVar[str] = "load-checkpoint"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CANONICAL})

    path: str
    check: bool = True

    def run(self, model: ir.Model, context: Context) -> bool:
        if not self.path:
            raise QGraphError("no checkpoint is given: set path to the folder with its config.json")
        checkpoint = Checkpoint.open(self.path)
        graph = modules(model)
        names = aligned(checkpoint.modules, graph)
        placed: set[str] = set()
        matrices = _Matrices(self, model, context, checkpoint, placed)
        vectors = _Vectors(self, model, checkpoint, placed)
        for path, members in context.progress(graph.items(), "loading weights", len(graph)):
            parts = [names[part] for part in parts_of(path, names)]
            sites = [site for node in members if (site := site_of(node)) is not None]
            matrices.load(parts, sites)
            if all(site.kind in ("activations", "rnn") for site in sites):
                vectors.load(parts, "weight", _SCALES, members)
            vectors.load(parts, "bias", _SHIFTS, members)
        matrices.tie()
        vectors.place_norms()
        self._tell_what_is_left(checkpoint, placed, context)
        remove_dead(model)
        return True

    def _tell_what_is_left(
        self, checkpoint: Checkpoint, placed: set[str], context: Context
    ) -> None:
        """Look for modules of the checkpoint that the graph has no place for.

        Raises:
            ModelError: one of them is quantized.
        """
        left = sorted(set(checkpoint.modules) - placed)
        if packed := [name for name in left if checkpoint.is_quantized(name)]:
            raise ModelError(
                f"the graph has no product for layer '{packed[0]}' of the checkpoint: "
                "give a graph of the same model"
            )
        if left:
            why = f"the graph has no place for {', '.join(left[:4])}: not loaded"
            context.remark("note", self.name, "", "", why, modules=len(left))


@dataclass
class _Matrices:
    """Weights of products, tables and convolutions.

    Attributes:
        placed: modules of the checkpoint that have found their place.
        weights: new weights of products and the order that their data must be in, by modules and
            old weight.
        reordered: data in another order, by data, graph and order.
        tables: old table of each lookup, and the module that has replaced it.
        missing: products for which the checkpoint has no module.
    """

    step: LoadCheckpoint
    model: ir.Model
    context: Context
    checkpoint: Checkpoint
    placed: set[str]
    weights: dict[tuple[tuple[str, ...], ir.Value], tuple[ir.Value, NDArray[np.int64] | None]] = (
        field(default_factory=dict)
    )
    reordered: dict[tuple[ir.Value, int, bytes], ir.Value] = field(default_factory=dict)
    tables: list[tuple[ir.Value, str]] = field(default_factory=list)
    missing: list[Site] = field(default_factory=list)

    def load(self, parts: Sequence[str], sites: Sequence[Site]) -> None:
        """Place the matrices of modules which compute these sites, side by side."""
        if not parts:
            self.missing += [site for site in sites if site.is_product]
            return
        for site in sites:
            if site.is_product:
                self._product(site, parts, check=self.step.check)
            elif site.kind not in ("activations", "rnn"):
                self._table(site, parts[0])

    def tie(self) -> None:
        """Give products without a module the tables that they shared their weights with.

        Raises:
            ModelError: a product is left that must not be.
        """
        for site in self.missing:
            self._tie(site)

    def _product(self, site: Site, parts: Sequence[str], *, check: bool) -> None:
        key = (tuple(parts), site.weight)
        if key not in self.weights:
            self.weights[key] = self._columns(site, parts, check)
        value, order = self.weights[key]
        if order is not None:
            site.node.replace_input_with(site.x_index, self._in_order(site, order))
        site.node.replace_input_with(site.w_index, value)
        self.placed.update(parts)

    def _columns(
        self, site: Site, parts: Sequence[str], check: bool
    ) -> tuple[ir.Value, NDArray[np.int64] | None]:
        """The new weight of a product, and the order that its data must be in."""
        checkpoint, base = self.checkpoint, f"{site.weight.name}_{self.checkpoint.method}"
        layers = [checkpoint.layer(p) if checkpoint.is_quantized(p) else None for p in parts]
        shapes = [
            layer.q.shape if layer else checkpoint.shape(f"{part}.weight")[::-1]
            for part, layer in zip(parts, layers, strict=True)
        ]
        kn = (shapes[0][0], sum(shape[-1] for shape in shapes))
        if kn != site.kn or any(shape[0] != kn[0] for shape in shapes):
            raise misfit(" + ".join(parts), kn, site, site.kn)
        if check:
            self._compare(site, parts, layers)
        packed = [layer for layer in layers if layer is not None]
        whole = joined(packed) if len(packed) == len(parts) else None
        if whole is None:
            if packed:
                why = f"{', '.join(parts)} differ in bits, groups or order: one float weight"
                self.step.remark(self.context, site, "declined", why)
            make = partial(checkpoint.side_by_side, tuple(parts), site.axis)
            return _constant(self.model, base, make, site.weight), None
        spec, weight = whole.quantized(site.axis)
        value = _constant(self.model, base, weight.float, site.weight)
        set_integers(value, spec, weight)
        what = f"{checkpoint.method} weights of {', '.join(parts)}"
        self.step.remark(
            self.context, site, "applied", what, bits=whole.bits, group_size=whole.size
        )
        return value, whole.order

    def _compare(self, site: Site, parts: Sequence[str], layers: Sequence[Layer | None]) -> None:
        """Hold the layers against the float weight that the graph has.

        Raises:
            ModelError: one of them is another layer, or was misread.
        """
        w = constant_array(site.weight)
        given = np.asarray(w if site.axis == 1 else w.T, np.float32)
        start = 0
        for part, layer in zip(parts, layers, strict=True):
            loaded = layer.float() if layer else self.checkpoint.matrix(part)
            check_alike(part, site, given[:, start : start + loaded.shape[1]], loaded, layer)
            start += loaded.shape[1]
        del w, given
        release(site.weight)

    def _in_order(self, site: Site, order: NDArray[np.int64]) -> ir.Value:
        """The site's data with its channels in another order, made once for all that want it."""
        x, graph = site.x, site.node.graph
        assert graph is not None
        key = (x, id(graph), order.tobytes())
        if key not in self.reordered:
            producer = x.producer()
            beside = producer is not None and producer.graph is graph
            index = add_constant(self.model, f"{x.name}_order", order)
            gather = insert(
                self.model, producer if beside and producer else graph[0], "Gather", [x, index],
                base=f"{x.name}_in_order", attributes={"axis": -1}, after=beside,
            )  # fmt: skip
            self.reordered[key] = typed(gather, x.dtype, x.shape)
            why = "act-order: a Gather brings its data into the order of the weight's groups"
            self.step.remark(self.context, site, "note", why)
        return self.reordered[key]

    def _table(self, site: Site, part: str) -> None:
        """A lookup table, or the weight of a convolution: as it is stored."""
        name = f"{part}.weight"
        if name not in self.checkpoint.files:
            return
        shape = self.checkpoint.shape(name)
        if shape != tuple(dims(site.weight)):
            raise misfit(part, shape, site, tuple(d or 0 for d in dims(site.weight)))
        make = partial(self.checkpoint.tensor, name)
        if self.step.check and not near(make(), array(site.weight)):
            raise unlike(part, site)
        release(site.weight)
        self.tables.append((site.weight, part))
        value = _constant(self.model, f"{site.weight.name}_loaded", make, site.weight)
        site.node.replace_input_with(site.w_index, value)
        self.placed.add(part)

    def _tie(self, site: Site) -> None:
        """Give a product without a module the table that it shared its weight with, if it did."""
        for table, part in self.tables:
            if site.kn == tuple(dims(table))[::-1] and tied(table, site):
                self._product(site, [part], check=False)
                return
        if not self.step.check:
            raise ModelError(
                f"the checkpoint has no weights for layer '{site.name}' of the graph: "
                "give a graph of the same model"
            )
        self.step.remark(
            self.context, site, "warning", "not in the checkpoint: keeps the weights of the graph"
        )


@dataclass
class _Vectors:
    """Biases, and weights of norms.

    Attributes:
        placed: modules of the checkpoint that have found their place.
        norms: weights of norms, and where they belong.
    """

    step: LoadCheckpoint
    model: ir.Model
    checkpoint: Checkpoint
    placed: set[str]
    norms: list[tuple[Float, ir.Node, int]] = field(default_factory=list)

    def load(
        self,
        parts: Sequence[str],
        parameter: str,
        places: dict[str, tuple[int, ...]],
        members: Sequence[ir.Node],
    ) -> None:
        """Put `parameter` of these modules where `members` have a constant of that role and size.

        Raises:
            ModelError: there is a bias for which the graph has no place.
        """
        names = [name for part in parts if (name := f"{part}.{parameter}") in self.checkpoint.files]
        if not names or any(len(self.checkpoint.shape(name)) != 1 for name in names):
            return
        vector = np.concatenate([self.checkpoint.tensor(name) for name in names]).astype(np.float32)
        uses = [
            (node, index)
            for node in members
            for index in places.get(node.op_type, ())
            if index < len(node.inputs) and _is_vector(node.inputs[index], vector.size)
        ]
        if len(names) < len(parts) or (not uses and parameter == "bias" and vector.any()):
            raise ModelError(
                f"the graph has no place for '{names[0]}' of the checkpoint: "
                "give a graph of the same model"
            )
        self.placed.update(parts)
        for node, index in uses:
            if parameter == "weight":
                self.norms.append((vector, node, index))
            else:
                self._place_vector(vector, node, index)

    def _place_vector(self, vector: NDArray[Any], node: ir.Node, index: int) -> None:
        old = input_of(node, index)
        make = partial(vector.reshape, [d or 1 for d in dims(old)])
        node.replace_input_with(index, _constant(self.model, f"{old.name}_loaded", make, old))

    def place_norms(self) -> None:
        """Some models multiply by 1 + w, which their graphs hold as one constant: whether this one
        does, its own weights tell. AWQ changes some of them, so the majority counts.

        Raises:
            ModelError: it may be such a model, and its graph cannot tell.
        """
        if not self.step.check and self.checkpoint.model_type.startswith(ONE_MORE):
            raise ModelError(
                f"norms of {self.checkpoint.model_type} may add one to their weights, which random "
                "weights do not show: give the float model, and check=true"
            )
        votes = 0
        for vector, node, index in self.norms if self.step.check else ():
            old = array(node.inputs[index])
            votes += near(vector + 1, old) - near(vector, old)
        for vector, node, index in self.norms:
            self._place_vector(vector + 1 if votes > 0 else vector, node, index)


def _constant(
    model: ir.Model, base: str, make: Callable[[], NDArray[Any]], old: ir.Value
) -> ir.Value:
    """A constant in place of `old`, computed whenever it is read."""
    like = constant_tensor(old)
    lazy = computed(lambda: np.ascontiguousarray(make()), like.dtype, like.shape.numpy())
    return add_constant(model, base, lazy)


def _is_vector(value: ir.Value | None, size: int) -> bool:
    """Whether it is a constant of that many floats along one axis."""
    tensor = constant(value)
    if tensor is None or tensor.dtype not in FLOATS:
        return False
    return tensor.size == size and size in (*tensor.shape.numpy(), 1)
