"""onnx-ir in few words: what passes read, change and find in a graph."""

from qgraph.graph.annotation import (
    commit_to,
    data_spec,
    integers_of,
    retract,
    set_spec,
    set_use_spec,
    spec_of,
    stats_of,
    use_spec,
    weight_spec,
)
from qgraph.graph.editing import (
    add_constant,
    insert,
    redirect,
    remove_dead,
    shared_constant,
)
from qgraph.graph.names import fresh_name
from qgraph.graph.reading import (
    array,
    attribute,
    constant,
    dims,
    graphs,
    is_op,
    nodes,
    opset,
    release,
)
from qgraph.graph.sites import Site, only_user, site_of, sites
from qgraph.graph.types import infer_types

__all__ = [
    "Site",
    "add_constant",
    "array",
    "attribute",
    "commit_to",
    "constant",
    "data_spec",
    "dims",
    "fresh_name",
    "graphs",
    "infer_types",
    "insert",
    "integers_of",
    "is_op",
    "nodes",
    "only_user",
    "opset",
    "redirect",
    "release",
    "remove_dead",
    "retract",
    "set_spec",
    "set_use_spec",
    "shared_constant",
    "site_of",
    "sites",
    "spec_of",
    "stats_of",
    "use_spec",
    "weight_spec",
]
