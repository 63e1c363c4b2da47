"""Outputs of a run, stored as they are generated, so that an interrupted run resumes; and those that are blank."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)


class BlankOutputs:
    """
    Counts outputs without a visible character, to warn of them once.

    Attributes:
        blank: Number of blank outputs.
        total: Number of all outputs.
    """

    def __init__(self) -> None:
        self.blank = self.total = 0

    def count(self, outputs: Iterable[str]) -> None:
        """Count more outputs."""
        for output in outputs:
            self.total += 1
            self.blank += not output.strip()

    def warn(self) -> None:
        """Log a warning with the count and the likely causes, if any output is blank."""
        if self.blank:
            logger.warning(
                f"{self.blank:,} of {self.total:,} outputs {'is' if self.blank == 1 else 'are'} blank. Likely causes: "
                "the model is not trained, its tokenizer is another one than in training, or its weights or hidden "
                "states are not finite."
            )


def warn_of_blank_outputs(outputs: Iterable[str]) -> None:
    """Log one warning, with the count and the likely causes, if any of all outputs of a run is blank."""
    counted = BlankOutputs()
    counted.count(outputs)
    counted.warn()


class OutputParts:
    """
    The outputs so far, in one file of JSON lines for each process. Its first line holds the settings of the run, each
    other line the outputs of a batch.

    Args:
        output: The final file. Parts are written to its folder.
        settings: The settings that an output depends on, in addition to its prompt.
        rank: Number of this process.
        overwrite: Remove parts of other settings. Those of the same settings are resumed.

    Attributes:
        outputs: Each output so far, by its key.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the file belongs to a run with other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], rank: int = 0, overwrite: bool = False):
        self.output = output
        self.settings = json.loads(json.dumps(settings))
        self.path = output.with_name(f"{output.name}.part-{rank}" if rank else f"{output.name}.part")
        if overwrite and any(self._settings_of(path) != self.settings for path in self._paths()):
            self.remove()
        self.outputs = self.read_all()
        self._empty = self._cut_torn_line() == 0

    def keep(self, outputs: Mapping[str, str]) -> None:
        """Add the outputs of a batch: all of them, or none if the process dies."""
        lines = [self.settings, outputs] if self._empty else [outputs]
        rest = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        advice = "Earlier outputs are kept: free some disk space, and repeat the command."
        with writing(self.path, advice), self.path.open("ab", buffering=0) as file:
            while rest:
                rest = rest[file.write(rest) :]
        self._empty = False
        self.outputs.update(outputs)

    def read_all(self) -> dict[str, str]:
        """Return all outputs so far by their keys, those of other processes included."""
        outputs: dict[str, str] = {}
        for path in self._paths():
            lines = self._complete_lines(path)
            if self._settings_of(path) != self.settings:
                raise ValueError(
                    f"{path} belongs to a run with another model, other data or other settings. Repeat those, remove "
                    "the file, or add --overwrite."
                )
            for line in islice(lines, 1, None):
                outputs.update(line)
        return outputs

    def _settings_of(self, path: Path) -> Any:
        """Return the settings in the first line of a file, or those of this run if that line was not finished."""
        with path.open("rb") as file:
            line = file.readline()
        if not line.endswith(b"\n") and line[:1] in b"{":
            return self.settings
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path} is not an unfinished output of an earlier run. Move it away, or choose another output."
            ) from error

    def remove(self) -> None:
        """Remove the files."""
        for path in self._paths():
            path.unlink(missing_ok=True)  # another process may remove them at the same time

    def _paths(self) -> list[Path]:
        return [path for path in sorted(self.output.parent.glob("*.part*")) if self._is_part(path.name)]

    def _is_part(self, name: str) -> bool:
        rest = name.removeprefix(f"{self.output.name}.part")
        return rest != name and (not rest or rest[0] == "-" and rest[1:].isdigit())

    def _complete_lines(self, path: Path) -> Iterator[dict[str, str]]:
        with path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):  # a killed run may have written half a line
                    yield json.loads(line)

    def _cut_torn_line(self) -> int:
        """Cut off the line that a killed run did not finish, and return the number of bytes left."""
        if not self.path.exists():
            return 0
        with self.path.open("rb+") as file:
            end = sum(len(line) for line in file if line.endswith(b"\n"))
            return file.truncate(end)


def one_line(text: str) -> str:
    """Return the text with a space in place of each line end of any kind."""
    return " ".join(f"{text}.".splitlines())[:-1]  # the full stop keeps a line end at the end of the text


@contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Turn a failure to write into an `OSError` that names the file, the cause and the fix."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}. {advice}") from error
