"""Checkpoints: reading in any format, choosing tensors, fingerprints, whole outputs."""

from svftool.checkpoints.base import Checkpoint, Shard, TensorInfo, plain_name, wrapper_prefix
from svftool.checkpoints.dtypes import dtype_name, dtype_named
from svftool.checkpoints.fingerprint import (
    Fingerprint,
    fingerprint,
    fingerprint_checkpoint,
    tensor_digest,
)
from svftool.checkpoints.opening import open_checkpoint
from svftool.checkpoints.pickle_writer import save_pickled
from svftool.checkpoints.selection import (
    Choice,
    LeftWhole,
    Selection,
    check_patterns,
    is_code,
    is_expert_stack,
    is_vocabulary,
    matches,
    output_heads,
    select,
    table_role,
)
from svftool.checkpoints.sharding import plan_shards, shard_names, write_index
from svftool.checkpoints.views import View, from_matrix, matrix_shape, to_matrix
from svftool.checkpoints.writer import CheckpointWriter, SafetensorsWriter
from svftool.choices.sizes import parse_size
from svftool.errors import write_errors
from svftool.files.folder import class_labels
from svftool.files.header import parse_json
from svftool.files.names import PICKLE_SUFFIXES, WEIGHT_SUFFIXES
from svftool.files.output import PARTIAL, replace_output
from svftool.files.side_files import SideFiles, side_files

__all__ = [
    "PARTIAL",
    "PICKLE_SUFFIXES",
    "WEIGHT_SUFFIXES",
    "Checkpoint",
    "CheckpointWriter",
    "Choice",
    "Fingerprint",
    "LeftWhole",
    "SafetensorsWriter",
    "Selection",
    "Shard",
    "SideFiles",
    "TensorInfo",
    "View",
    "check_patterns",
    "class_labels",
    "dtype_name",
    "dtype_named",
    "fingerprint",
    "fingerprint_checkpoint",
    "from_matrix",
    "is_code",
    "is_expert_stack",
    "is_vocabulary",
    "matches",
    "matrix_shape",
    "open_checkpoint",
    "output_heads",
    "parse_json",
    "parse_size",
    "plain_name",
    "plan_shards",
    "replace_output",
    "save_pickled",
    "select",
    "shard_names",
    "side_files",
    "table_role",
    "tensor_digest",
    "to_matrix",
    "wrapper_prefix",
    "write_errors",
    "write_index",
]
