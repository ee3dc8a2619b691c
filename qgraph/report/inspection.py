"""What a model is made of, as tables: `qgraph inspect`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import onnx_ir as ir
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qgraph.graph.reading import constant, graphs, nodes
from qgraph.graph.sites import sites
from qgraph.io.models import source_files
from qgraph.report.page import human_size
from qgraph.report.tables import row, table

_QUANTIZED = ("Quantize", "QLinear", "QGemm", "Integer", "MatMulNBits", "Bnb4", "BlockQuantized")


def describe(model: ir.Model) -> RenderableType:
    """The whole model."""
    return Group(*_parts(model))


def _parts(model: ir.Model) -> Iterator[RenderableType]:
    versions = ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in model.opset_imports.items())
    producer = f"{model.producer_name or 'unknown'} {model.producer_version or ''}".rstrip()
    yield Text(f"IR version {model.ir_version}, opsets {versions}, made by {producer}")
    for path in source_files(model):
        yield Text(f"{path} ({human_size(path.stat().st_size)})")
    yield _interface(model)
    yield _weights(model)
    yield _operators(model)
    yield _sites(model)


def _type(value: ir.Value) -> str:
    dims = "*" if value.shape is None else ", ".join(str(d) for d in value.shape)
    if isinstance(value.type, ir.TensorType):
        return f"{value.type.dtype.name.lower()}[{dims}]"
    return "?" if value.type is None else str(value.type)


def _interface(model: ir.Model) -> Table:
    listing = table("", "name", "type")
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            row(listing, kind, value.name, _type(value))
    return listing


def _weights(model: ir.Model) -> Table:
    """Constants of all graphs by dtype, `Constant` nodes included."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for graph in graphs(model):
        values = list(graph.initializers.values()) if isinstance(graph, ir.Graph) else []
        values += [node.outputs[0] for node in graph if node.op_type == "Constant"]
        for value in values:
            if (tensor := constant(value)) is not None:
                count[tensor.dtype.name.lower()] += 1
                size[tensor.dtype.name.lower()] += tensor.nbytes
    listing = table("constants", "count", "size", right=("count", "size"))
    for dtype, total in size.most_common():
        row(listing, dtype, count[dtype], human_size(total))
    return listing


def _operators(model: ir.Model) -> Table:
    listing = table("operator", "count", "", right=("count",))
    count = Counter((node.domain, node.op_type) for node in nodes(model))
    for (domain, op), number in sorted(count.items(), key=lambda item: (-item[1], item[0])):
        quantized = any(part in op for part in _QUANTIZED)
        row(listing, f"{domain}::{op}" if domain else op, number, "quantized" if quantized else "")
    return listing


def _sites(model: ir.Model) -> RenderableType:
    """Operators with a float weight, or of two computed operands, in graph order."""
    listing = table("site", "operator", "weight", "size", right=("size",))
    total: defaultdict[str, int] = defaultdict(int)
    for site in sites(model):
        tensor = constant(site.weight)
        total[site.node.op_type] += 1
        size = "" if tensor is None else human_size(tensor.nbytes)
        weight = (
            "computed" if tensor is None else f"{tensor.dtype.name.lower()}{list(tensor.shape)}"
        )
        row(listing, site.name, site.node.op_type, weight, size)
    if not total:
        return Text("no float operator that could be quantized")
    counted = ", ".join(f"{number} {op}" for op, number in total.items())
    return Group(Text(f"sites: {counted}"), listing)
