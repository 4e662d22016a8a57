"""The whole road: measure, plan, apply, recalibrate; and the search for the smallest model that is good enough."""

from rankfold.pipeline._compress import compress
from rankfold.pipeline._damage import measure_damage
from rankfold.pipeline._latency_check import plan_in_time
from rankfold.pipeline._plan import plan
from rankfold.pipeline._search import SearchResult, Step, search

__all__ = ["SearchResult", "Step", "measure_damage", "compress", "plan", "plan_in_time", "search"]
