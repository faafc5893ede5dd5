"""Writing and reading files that are either whole or not there at all.

:func:`atomic_write` is for one file of any kind. :func:`save_tensors` and :func:`open_tensors` keep named tensors as
``.safetensors``, in shards when large (by the convention of transformers: ``name-00001-of-00003.safetensors`` with
``name.safetensors.index.json``), and the header says what they are. :func:`mapped_zeros` is for
values that need no name.
"""

from fishkern.files.atomic import atomic_write, check_target, remove_leftovers
from fishkern.files.folders import atomic_folder, check_new_folder
from fishkern.files.gathering import is_sharded, write_from_ranks
from fishkern.files.loading import Format, check_format, files_of, format_of, open_one, open_tensors
from fishkern.files.mapped import mapped_zeros
from fishkern.files.model_files import ModelFiles, copy_beside, open_model
from fishkern.files.parsing import checked_shape, in_brief, parsing, read_count, read_json
from fishkern.files.region import Region, read_region, region_of
from fishkern.files.saving import check_cast, save_tensors, write_one
from fishkern.files.tensors import PIECE, AnyTensor, StoredTensor, pieces

__all__ = [
    "PIECE",
    "AnyTensor",
    "Format",
    "ModelFiles",
    "Region",
    "StoredTensor",
    "atomic_folder",
    "atomic_write",
    "check_cast",
    "check_format",
    "check_new_folder",
    "check_target",
    "checked_shape",
    "copy_beside",
    "files_of",
    "format_of",
    "in_brief",
    "is_sharded",
    "mapped_zeros",
    "open_model",
    "open_one",
    "open_tensors",
    "parsing",
    "pieces",
    "read_count",
    "read_json",
    "read_region",
    "region_of",
    "remove_leftovers",
    "save_tensors",
    "write_from_ranks",
    "write_one",
]
