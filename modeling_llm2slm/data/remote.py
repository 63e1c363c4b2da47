"""Data on the filesystems that Arrow, and with it Ray, reads (`s3://`, `gs://`, `hdfs://`), and folders of files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.dataset as arrow_dataset
import pyarrow.fs as filesystems
import pyarrow.parquet as parquet

from ..files_llm2slm import first_line
from .formats import file_format_of, is_jsonl, open_file


def is_elsewhere(source: str | Path) -> bool:
    """Return whether a source is an address such as `s3://bucket/rows.parquet`."""
    return "://" in str(source)


@contextmanager
def as_file(source: str) -> Iterator[Path]:
    """
    Yield the path of a local file with the rows of a source.

    Args:
        source: A path or a name, which is yielded as it is; or an address or a local folder, whose rows are copied.
            The files of a folder are joined in the order of their names; all are Parquet or all JSON lines.

    Raises:
        FileNotFoundError: If there is nothing at the address, or no such file in the folder.
        ValueError: If the address cannot be read, or the files are of several formats.
    """
    path = Path(source).expanduser()
    if not is_elsewhere(source) and not path.is_dir():
        yield path
        return
    with TemporaryDirectory() as folder:
        if is_elsewhere(source):
            path = _fetch(source, Path(folder, "fetched"))
        joined = _joined(source, path, Path(folder)) if path.is_dir() else path
        try:
            yield joined
        except ValueError as error:
            raise ValueError(str(error).replace(str(joined), source)) from error  # name what the user gave


def _fetch(source: str, folder: Path) -> Path:
    """Copy a file or a folder at an address, and return the path of the copy."""
    try:
        filesystem, place = filesystems.FileSystem.from_uri(source)
        kind = filesystem.get_file_info(place).type
        if kind != filesystems.FileType.NotFound:
            target = folder / Path(place).name
            target.mkdir(parents=True) if kind == filesystems.FileType.Directory else folder.mkdir(parents=True)
            filesystems.copy_files(place, str(target), source_filesystem=filesystem)
            return target
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{source} cannot be read: {first_line(error)}") from error
    raise FileNotFoundError(f"There is nothing at {source}.")


def _joined(source: str, place: Path, folder: Path) -> Path:
    """Return a file with the rows of all files below a folder."""
    names = (file.relative_to(place) for file in sorted(place.rglob("*")) if file.is_file())
    # Spark and others write files with these first letters next to their parts.
    files = [place / name for name in names if not any(part.startswith((".", "_")) for part in name.parts)]
    files = [file for file in files if file_format_of(file) is not None]
    if not files:
        raise FileNotFoundError(f"{source} is a folder without Parquet or JSON lines (.parquet, .jsonl).")
    if all(file_format_of(file) == "parquet" for file in files):
        return _joined_parquet(files, folder / "rows.parquet")
    if all(map(is_jsonl, files)):
        return _joined_lines(files, folder / "rows.jsonl")
    raise ValueError(f"{source} holds files of several formats. Keep those of one: .parquet or .jsonl.")


def _joined_parquet(files: Sequence[Path], target: Path) -> Path:
    rows = arrow_dataset.dataset([str(file) for file in files], format="parquet")
    with parquet.ParquetWriter(target, rows.schema) as writer:
        for batch in rows.to_batches():
            writer.write_batch(batch)
    return target


def _joined_lines(files: Sequence[Path], target: Path) -> Path:
    with target.open("wb") as joined:
        for file in files:
            with open_file(file, "rb") as content:
                shutil.copyfileobj(content, joined)
            joined.write(b"\n")  # the last line of a file may have no end; empty lines are no rows
    return target
