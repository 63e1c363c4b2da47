"""What holds for every test: no network, no user cache, one thread, and no deprecation that transformers logs."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


# Both are read when huggingface_hub is imported. A cache of its own keeps a test run apart from what the user has, and
# two workers apart from each other.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="llm2slm-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import torch  # noqa: E402 - after the environment
import transformers  # noqa: E402 - after the environment
from transformers.utils import logging as transformers_logging  # noqa: E402 - after the environment


TRANSFORMERS = f"{Path(transformers.__file__).parent}/"


class OwnCall(NamedTuple):
    """A call inside transformers that makes it log a deprecation, which nobody outside can change."""

    file: str  # below transformers/
    function: str
    message: str  # part of what is logged


TRANSFORMERS_OWN_CALLS = (
    # Assisted generation calls the assistant's generate() with a generation config and keyword arguments next to it.
    OwnCall("generation/candidate_generator.py", "_generate_candidates", "Passing `generation_config` together with"),
)


class DeprecationRecorder(logging.Handler):
    """Keeps every deprecation that transformers logs, with the place in transformers that logged it."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" not in message.lower() and "will be removed" not in message.lower():
            return
        sites = self._sites()
        for own in TRANSFORMERS_OWN_CALLS:
            if own.message in message and (own.file, own.function) in [site[:2] for site in sites]:
                return
        chain = " > ".join(f"{file}:{line} {function}" for file, function, line in sites)
        self.found.append(f"{message} [{chain}]")

    @staticmethod
    def _sites() -> list[tuple[str, str, int | None]]:
        """File, function and line of each frame in transformers, the innermost last, without its logging helpers."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(TRANSFORMERS)]
        sites = [(frame.filename.removeprefix(TRANSFORMERS), frame.name, frame.lineno) for frame in frames]
        return [site for site in sites if site[0] != "utils/logging.py"]


DEPRECATIONS = DeprecationRecorder()


def pytest_configure() -> None:
    torch.set_num_threads(1)  # tiny models run fastest on one thread, and the workers run side by side
    transformers_logging.disable_progress_bar()
    transformers_logging.add_handler(DEPRECATIONS)


@pytest.fixture(autouse=True)
def no_logged_deprecation() -> Iterator[None]:
    """Fails the test in which transformers logs a deprecation that is not one of its own calls."""
    transformers_logging.set_verbosity_warning()  # the console command quietens it, also for the tests after its own
    logging.Logger.warning_once.cache_clear()  # else only the first test to cause a warning would see it
    yield
    found, DEPRECATIONS.found[:] = list(DEPRECATIONS.found), []
    assert not found, "transformers logged a deprecation:\n" + "\n".join(found)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data that LLM2SLM_DATA names; a test that needs it is skipped where it is not set."""
    folder = os.environ.get("LLM2SLM_DATA")
    if not folder:
        pytest.skip("needs real data: set LLM2SLM_DATA to its folder")
    return Path(folder)
