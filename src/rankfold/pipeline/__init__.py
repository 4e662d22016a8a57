"""The whole road: measure, plan, apply, recalibrate; and the search for the smallest model that is good enough."""

from rankfold.pipeline._compress import compress
from rankfold.pipeline._damage import calibrate
from rankfold.pipeline._latency_check import plan_in_time
from rankfold.pipeline._search import SearchResult, search
from rankfold.pipeline._steps import Data, planner

__all__ = [
    "Data",
    "SearchResult",
    "calibrate",
    "compress",
    "plan_in_time",
    "planner",
    "search",
]
