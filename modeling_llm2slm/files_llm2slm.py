# Copyright 2026 The modeling-llm2slm authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Files of checkpoints: put in place whole or not at all, found in a folder or on the Hub, read without pickle."""

import ctypes
import glob
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
SAMPLES = 128  # values of each tensor that a fingerprint reads, at each of two places


@contextmanager
def atomic_write(path: str | os.PathLike, keep: bool = True) -> Iterator[Path]:
    """
    Gives a place beside `path` to write a file or a folder to, and puts it at `path` at the end.

    If the body raises or the process dies, nothing at `path` has changed. A folder that is there already is exchanged
    in one step, and keeps what is not written anew, but for weights and graphs where new weights are written: the old
    ones would answer if both were there. With `keep=False` it keeps nothing.

    An `OSError` of the system names `path`, also where a full disk has no name.
    """
    path = Path(os.path.realpath(path))
    check_replaceable(path)
    aside = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")  # as deep as `path`: relative paths stay true
    with _named(path, aside):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            if aside.is_dir() and path.is_dir():
                _replace_folder(aside, path, keep)
            else:
                aside.replace(path)
        finally:
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Raise `PermissionError` for a folder beside which nothing can be written, as for a mounted one in `/`."""
    path = Path(os.path.realpath(path))
    if path.is_dir() and not os.access(path.parent, os.W_OK):
        raise PermissionError(
            f"{path} is put in place from beside it, and {path.parent} is not writable. Choose a folder in it, such "
            f"as {path / 'model'}."
        )


def remove_unfinished(path: Path) -> None:
    """Removes what [`atomic_write`] had not finished when it was killed. A `*` in the name of `path` is any text."""
    path = Path(os.path.realpath(path))
    for left in path.parent.glob(f".{'[0-9a-f]' * 8}.{glob.escape(path.name).replace('[*]', '*')}"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def _named(path: Path, aside: Path) -> Iterator[None]:
    """Errors of the system about `aside`, or about nothing that has a name, as `OSError`s about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or str(error.filename).startswith(str(aside))):
            error.filename = str(path)
        raise
    except SafetensorError as error:
        number = re.search(r"serializing.*\(os error (\d+)\)", str(error))
        if number is None:
            raise OSError(f"{path} could not be written: {first_line(error)}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _replace_folder(new: Path, old: Path, keep: bool) -> None:
    """Put what is in `new` at `old`. Afterwards `new` is gone, or holds what is no longer needed."""
    written = {entry.name for entry in new.iterdir()}
    stale = {name for name in os.listdir(old) if name not in written and (_is_weights(name) or _is_exported(name))}
    stale = stale if any(map(_is_weights, written)) else set()
    # A shell in the folder would be left in a deleted one.
    if not Path.cwd().is_relative_to(old) and _swap(new, old, keep, written | stale):
        return
    for name in sorted(written, key=lambda name: name == "config.json"):
        remove_unfinished(old / name)
        beside = old / f".{uuid.uuid4().hex[:8]}.{name}"
        try:
            shutil.move(new / name, beside)  # to a mounted disk, a copy: under another name until it is whole
            if (old / name).is_dir():
                shutil.rmtree(old / name)
            beside.replace(old / name)
        except BaseException:
            remove_unfinished(old / name)
            raise
    for name in stale:
        (old / name).unlink()


def _swap(new: Path, old: Path, keep: bool, replaced: set[str]) -> bool:
    """Exchange two folders, and take over what is not replaced; `False` where one is a mount point."""
    if new.stat().st_dev != old.stat().st_dev:
        return False
    for entry in old.iterdir() if keep else ():
        if entry.name not in replaced:
            _link(entry, new / entry.name)
    shutil.copymode(old, new)
    if _exchange(new, old):
        return True
    backup = old.with_name(f".{uuid.uuid4().hex[:8]}.old.{old.name}")
    try:
        old.replace(backup)
    except OSError:
        return False
    new.replace(old)
    shutil.rmtree(backup, ignore_errors=True)
    return True


def _is_weights(name: str) -> bool:
    return name in (WEIGHTS, INDEX) or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) is not None


def _is_exported(name: str) -> bool:
    """Whether a file is of a model that `llm2slm export` wrote: its graphs, their tables, or what lists them."""
    graph = r"(openvino_)?(prompt|cross|step)\.(xml|bin|onnx|onnx\.data)"
    return name in ("export.json", "embeddings.safetensors") or re.fullmatch(graph, name) is not None


def _link(source: Path, target: Path) -> None:
    """The same files under a second name; a copy where the file system has no hard links."""

    def link_or_copy(file: str, name: str) -> None:
        try:
            os.link(file, name, follow_symlinks=False)
        except OSError:
            shutil.copy2(file, name, follow_symlinks=False)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=link_or_copy)
    else:
        link_or_copy(str(source), str(target))


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step, where the system can (Linux: renameat2)."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def weight_files(source: str | Path, on_hub: bool, subfolder: str = "", **hub: Any) -> list[Path]:
    """
    The safetensors files of a checkpoint, downloaded where they are not.

    Args:
        source: A folder, or the id of a repository.
        on_hub: Which of the two `source` is. A folder that happens to have the name of a repository is never taken
            for it.
        subfolder: Where in it the checkpoint is.
        hub: Arguments of [`~huggingface_hub.hf_hub_download`]: `revision`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        OSError: If there are none, or they cannot be reached; pickled weights are never read.
        ValueError: If the index names a file outside the folder.
    """

    def fetch(name: str) -> Path | None:
        if not on_hub:
            file = Path(source, subfolder, name)
            return file if file.is_file() else None
        try:
            return Path(hf_hub_download(str(source), name, subfolder=subfolder or None, **hub))
        except EntryNotFoundError:  # also: not in the cache, and no network
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise OSError(f"{source} cannot be fetched from the Hub: {first_line(error)}") from error

    whole = fetch(WEIGHTS)
    if whole is not None:
        return [whole]
    index = fetch(INDEX)
    if index is None:
        where = "on the Hub, nor in the cache where the Hub is out of reach" if on_hub else "in this folder"
        raise OSError(f"{source} has no {WEIGHTS} and no index of shards {where}; pickled weights are not read.")
    files = []
    for name in shard_names(index):
        file = fetch(name)
        if file is None:
            raise OSError(f"{source} is incomplete: its shard {name} is missing.")
        files.append(file)
    return files


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, which must lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{index.name} in {index.parent} is damaged: it is no index of shards.") from error
    for name in names:
        check_file_name(name)
    return names


def check_file_name(name: str) -> None:
    """Raise `ValueError` for the name of a weights file that leads out of its folder or is not safetensors."""
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
        raise ValueError(f"A checkpoint names {name!r} as its weights, but only safetensors files beside it are read.")


def open_weights(files: Iterable[str | Path]) -> dict[str, Any]:
    """
    The tensors of safetensors files by name, as slices: `tensor[...]` reads all of one, `tensor[:2]` two rows.

    Raises:
        OSError: If a file is missing or damaged.
    """
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            handle = safe_open(str(file), framework="pt")
            names = handle.keys()
            tensors.update({name: handle.get_slice(name) for name in names})
        except (SafetensorError, FileNotFoundError) as error:
            raise OSError(f"{Path(file).name} is damaged or incomplete: {first_line(error)}") from error
    return tensors


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor, or of a slice from [`open_weights`]."""
    return tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)


class StoredTensor(NamedTuple):
    """Where a safetensors file holds a tensor, to read single values of it: a mapped page costs more than they do."""

    file: FileIO
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int, count: int) -> torch.Tensor:
        """`count` values from the one at `start` on, as if the tensor were flat."""
        count = min(count, math.prod(self.shape) - start)
        size = self.dtype.itemsize
        self.file.seek(self.offset + start * size)
        return torch.frombuffer(bytearray(self.file.read(count * size)), dtype=self.dtype)


def locate_tensors(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Where the tensors of sound safetensors files are. The format: a length, a header in JSON, the data."""
    located = {}
    for path in files:
        file = FileIO(path)  # open as long as a tensor of it is held
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            offset, dtype = 8 + length + entry["data_offsets"][0], DTYPES.get(entry["dtype"], torch.uint8)
            located[name] = StoredTensor(file, offset, tuple(entry["shape"]), dtype)
    return located


def fingerprint(tensors: Mapping[str, torch.Tensor | StoredTensor]) -> str:
    """
    Tells the weights of one model from those of another, at the cost of reading 256 values of each tensor.

    It covers the name and shape of every tensor and values at two places of each, rounded to bfloat16: the same
    weights have the same fingerprint however they are sharded, and in float32 and bfloat16 alike (float16 rounds
    twice). Other weights, and weights trained further, have another one; a change of single values may not be seen.

    Args:
        tensors: Tensors in memory or in files, by their names in the model.
    """
    digest, samples = hashlib.sha256(b"llm2slm-fingerprint-1"), []
    for name in sorted(tensors):
        tensor, shape = tensors[name], tuple(tensors[name].shape)
        digest.update(f"{name}{shape}".encode())
        for start in (math.prod(shape) // 3, math.prod(shape) * 2 // 3) if 0 not in shape else ():
            samples.append(_sample(tensor, start))
    # Cast in pieces small enough for one thread: waking others on a busy machine takes longer than all the rest.
    for piece in torch.cat(samples).split(2**14) if samples else ():
        digest.update(piece.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def _sample(tensor: torch.Tensor | StoredTensor, start: int) -> torch.Tensor:
    if isinstance(tensor, StoredTensor):
        return tensor.read(start, SAMPLES)
    return tensor.detach().reshape(-1)[start : start + SAMPLES]


def first_line(error: BaseException) -> str:
    """What went wrong, without the explanations that follow."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
