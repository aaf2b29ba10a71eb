"""Tensors to and from a directory, through torch.distributed.checkpoint, with no process group and no pickle of values.

Each directory is an ordinary, single-rank DCP checkpoint that DCP's own tools can read. DCP keeps its table of contents as
a pickle; it is read through an allow-list of the plain data classes it is made of.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from wbdist.checkpoint.files import FileLayer
from wbdist.checkpoint.manifest import FileEntry
from wbdist.checkpoint.tree import Tensors
from wbdist.errors import CheckpointCorruptError

# DCP warns whenever it works without a process group, which is what we ask of it. Filtered for good rather than around the
# calls: they run on a background thread, and warnings.catch_warnings swaps the whole process's filters.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized", category=UserWarning)

_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # where Python 3.13 keeps it
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import torch

        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise CheckpointCorruptError(f"the checkpoint's table of contents asks for {module}.{name}, which has no place there")


class _LayeredFileSystem(FileSystem):
    """DCP's file operations over a FileLayer; collects the entries of the files written."""

    def __init__(self, layer: FileLayer) -> None:
        self.layer = layer
        self.entries: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            raise ValueError(f"a checkpoint is only written, not opened with mode {mode!r}")
        with self.layer.writing(Path(path)) as stream:
            yield stream
        self.entries[Path(path).name] = stream.entry()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self.layer.rename(Path(path), Path(new_path))
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self.layer.make_directory(Path(path))


class _Writer(FileSystemWriter):
    def __init__(self, path: Path, layer: FileLayer) -> None:
        # sync_files off: the layer syncs each file as it is closed. No copy-ahead: everything is on the host already.
        super().__init__(path, sync_files=False, per_thread_copy_ahead=0, overwrite=False)
        self.fs: FileSystem = _LayeredFileSystem(layer)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = cast(Metadata, _MetadataUnpickler(cast(IO[bytes], file)).load())
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def write_tensors(layer: FileLayer, directory: Path, tensors: Tensors) -> dict[str, FileEntry]:
    """Saves host tensors into the new `directory`; the files are durable when this returns, their names not yet.

    Any thread; no collective. Returns name -> entry. Raises OSError as the system does.
    """
    if not tensors:
        layer.make_directory(directory)
        return {}
    writer = _Writer(directory, layer)
    try:
        save(dict(tensors), storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        raise _cause(error) from error
    return cast(_LayeredFileSystem, writer.fs).entries


def read_tensors(directory: Path, into: Tensors) -> None:
    """Fills the host tensors `into` from `directory`. Training thread; no collective.

    Raises CheckpointCorruptError when a tensor is absent or of another shape, OSError as the system does.
    """
    if not into:
        return
    try:
        load(dict(into), storage_reader=_Reader(directory), no_dist=True)
    except CheckpointException as error:
        cause = _cause(error)
        if isinstance(cause, OSError):
            raise cause from error
        raise CheckpointCorruptError(f"tensors in {directory} cannot be read: {cause}") from error


def _cause(error: CheckpointException) -> BaseException:
    """DCP wraps what happened as {rank: (exception, traceback)}; ours has one rank."""
    for failure, _ in error.failures.values():
        return failure
    return error
