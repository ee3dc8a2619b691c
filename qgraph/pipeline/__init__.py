"""Passes and what runs them."""

from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass, PassManager
from qgraph.pipeline.remarks import Remark, Remarks
from qgraph.pipeline.target import Target, Verdict

__all__ = ["Context", "Contract", "Pass", "PassManager", "Remark", "Remarks", "Target", "Verdict"]
