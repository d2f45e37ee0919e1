"""PXGen: post-hoc explanation of a generative model through anchors (arXiv 2501.11827).

>>> import protofast as pf
>>> report = pf.pxgen.explain(vae, anchors)  # doctest: +SKIP
"""

from .adapters import Adapter, DiffusionAdapter, FunctionAdapter, GeneratorAdapter, VAEAdapter
from .analysis import explain
from .criteria import CRITERIA, CriteriaError, Criterion, feature_distance, register_criterion
from .discovery import PAPER_CODE
from .noise import Noise
from .result import GROUPS, GroupSummary, Report, Representatives, Threshold

__all__ = [
    "CRITERIA",
    "GROUPS",
    "PAPER_CODE",
    "Adapter",
    "CriteriaError",
    "Criterion",
    "DiffusionAdapter",
    "FunctionAdapter",
    "GeneratorAdapter",
    "GroupSummary",
    "Noise",
    "Report",
    "Representatives",
    "Threshold",
    "VAEAdapter",
    "explain",
    "feature_distance",
    "register_criterion",
]
