# SPDX-License-Identifier: Apache-2.0
"""Budgeted comparison of anomaly detection models, on anomalib's pipelines.

``python -m anomalib_twostage.benchmark --config comparison.yaml`` trains and measures,
``python -m anomalib_twostage.benchmark.report results.csv --out name`` makes tables and a figure of it.
"""

from .job import ComparisonJob
from .narrow_draem import NarrowDraem
from .pipeline import Comparison, ComparisonJobGenerator
from .table import ResultsTable

__all__ = ["Comparison", "ComparisonJob", "ComparisonJobGenerator", "NarrowDraem", "ResultsTable"]
