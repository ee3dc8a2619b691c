"""onnx-ir in few words: what passes read, change and find in a graph."""

from qgraph.graph.editing import (
    add_constant,
    insert,
    redirect,
    remove_dead,
    shared_constant,
)
from qgraph.graph.names import fresh_name
from qgraph.graph.reading import array, attribute, constant, dims, graphs, is_op, nodes, opset
from qgraph.graph.sites import Site, only_user, site_of, sites
from qgraph.graph.types import infer_types

__all__ = [
    "Site",
    "add_constant",
    "array",
    "attribute",
    "constant",
    "dims",
    "fresh_name",
    "graphs",
    "infer_types",
    "insert",
    "is_op",
    "nodes",
    "only_user",
    "opset",
    "redirect",
    "remove_dead",
    "shared_constant",
    "site_of",
    "sites",
]
