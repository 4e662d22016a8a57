"""The most memory that a call holds beyond what was there before it, to the byte.

torch's profiler reports every allocation and release of torch's CPU allocator, inner buffers of kernels (reordered
weights, padded copies) included; packing buffers inside the BLAS are not torch's and are not counted, for nobody.
Weights, inputs and whatever else exists before the call do not count; outputs and gradients do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the largest sum of what was allocated and not yet released during one call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)
