"""The passes, one file each. Imported as `qgraph.passes`; `ALL` lists them."""

from __future__ import annotations

if __name__ != "qgraph.passes":
    raise ImportError("import this package as qgraph.passes")

from qgraph.passes.adaround import AdaRound
from qgraph.passes.annotate import Annotate
from qgraph.passes.autoround import AutoRound
from qgraph.passes.awq import AWQ
from qgraph.passes.balance_tables import BalanceTables
from qgraph.passes.bias_correction import BiasCorrection
from qgraph.passes.branch_on_rows import BranchOnRows
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.clip_weights import ClipWeights
from qgraph.passes.convert_opset import ConvertOpset
from qgraph.passes.distill import Distill
from qgraph.passes.equalize import Equalize
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fold_constants import FoldConstants
from qgraph.passes.fold_qdq import FoldQDQ
from qgraph.passes.fuse import Fuse
from qgraph.passes.gptq import GPTQ
from qgraph.passes.guard_static import GuardStatic
from qgraph.passes.hqq import HQQ
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.load_checkpoint import LoadCheckpoint
from qgraph.passes.lower import Lower
from qgraph.passes.quantize_kv_cache import QuantizeKVCache
from qgraph.passes.smooth import Smooth
from qgraph.passes.split_outliers import SplitOutliers
from qgraph.passes.use_bnb4 import UseBnb4
from qgraph.pipeline.pass_manager import Pass


def all_passes() -> dict[str, type[Pass]]:
    """The passes that come with qgraph, by the name that pipelines use, sorted by it."""
    return {step.name: step for step in sorted(ALL, key=lambda step: step.name)}


ALL: tuple[type[Pass], ...] = (
    # float: a graph of floats becomes one of few kinds of operators
    Canonicalize,
    ConvertOpset,
    FoldConstants,
    Fuse,
    FoldBatchNorm,
    Equalize,
    LoadCheckpoint,
    # annotated: what is to be quantized, and how, is said beside the graph
    Annotate,
    InsertObservers,
    # calibrated: statistics of the data are known, and say where the annotations go too far
    Calibrate,
    GuardStatic,
    # transformed: weights and data are changed, or rounded, so that less is lost
    AdaRound,
    AutoRound,
    AWQ,
    BalanceTables,
    BiasCorrection,
    ClipWeights,
    Distill,
    GPTQ,
    HQQ,
    Smooth,
    SplitOutliers,
    # committed: integers and QuantizeLinear, DequantizeLinear stand in the graph
    InsertQDQ,
    FoldQDQ,
    # lowered: the target has its own operators
    QuantizeKVCache,
    BranchOnRows,
    UseBnb4,
    Lower,
)
"""Every pass of qgraph, by the stage that it leads to. Add yours here: pipelines find it by its
`name`."""
