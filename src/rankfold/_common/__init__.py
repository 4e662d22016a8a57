"""Plumbing without a meaning of its own: batches, modes, files, tensors, tables, checks, progress bars, typing."""

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
from rankfold._common._checks import is_whole, near, one_of, real, some, whole
from rankfold._common._modes import evaluating, modes_kept
from rankfold._common._outputs import OutputError, output_error, output_tensors
from rankfold._common._progress import track
from rankfold._common._tables import html_table, text_table
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
    "html_table",
    "is_whole",
    "json_text",
    "modes_kept",
    "near",
    "one_of",
    "output_error",
    "output_tensors",
    "real",
    "read_tensors",
    "read_texts",
    "some",
    "tensors_in",
    "text_table",
    "to_device",
    "track",
    "whole",
    "write_tensors",
]
