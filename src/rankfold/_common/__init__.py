"""Plumbing without a meaning of its own: batches, modes, files, tensors, progress, typing."""

from rankfold._common._atomic import atomic_path
from rankfold._common._batches import (
    Arguments,
    batch_arguments,
    batch_target,
    device_of,
    example_arguments,
    first_tensor,
    tensors_in,
    to_device,
)
from rankfold._common._modes import evaluating, modes_kept
from rankfold._common._outputs import OutputError, output_error, output_tensors
from rankfold._common._progress import track
from rankfold._common._tensorfile import json_text, read_tensors, read_texts, write_tensors
from rankfold._common._tensors import check_dense
from rankfold._common._typing import Float, Rank

__all__ = [
    "Arguments",
    "Float",
    "OutputError",
    "Rank",
    "atomic_path",
    "batch_arguments",
    "batch_target",
    "check_dense",
    "device_of",
    "evaluating",
    "example_arguments",
    "first_tensor",
    "json_text",
    "modes_kept",
    "output_error",
    "output_tensors",
    "read_tensors",
    "read_texts",
    "tensors_in",
    "to_device",
    "track",
    "write_tensors",
]
