"""Quantize an ONNX model by NNCF; runs by itself, in an environment that has NNCF.

python nncf_quantize.py MODEL.onnx FOLDER_OF_NPZ OUT.onnx
"""

import os
import sys
from pathlib import Path

os.environ["NNCF_CI"] = "1"  # or it tells its makers about every call

import nncf
import numpy as np
import onnx


def is_transformer(graph: onnx.GraphProto) -> bool:
    """Whether activations are multiplied with activations, as only attention does."""
    weights = {weight.name for weight in graph.initializer}
    weights |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    return any(
        "Attention" in node.op_type or (node.op_type == "MatMul" and weights.isdisjoint(node.input))
        for node in graph.node
    )


def at_opset_20(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at an opset below 21, if it can be had.

    From 21 on, onnxruntime 1.32 does not load signed QuantizeLinear nodes around a Reshape: its
    optimizer gives them an attribute of another type.
    """
    try:
        return onnx.version_converter.convert_version(model, 20)
    except RuntimeError:  # operators of other domains
        return model


def main(source: Path, folder: Path, out: Path) -> None:
    """Quantize as NNCF's documentation recommends it for the kind of model."""
    feeds = [dict(np.load(file)) for file in sorted(folder.glob("*.npz"))]
    model = onnx.load(source)
    if any(entry.domain == "" and entry.version > 20 for entry in model.opset_import):
        model = at_opset_20(model)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER if is_transformer(model.graph) else None,
    )
    onnx.save(quantized, out, save_as_external_data=True, location=f"{out.name}.data")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
