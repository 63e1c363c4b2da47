"""
The interface behind which an engine computes a model, and the registry of engines.

An engine is one class in one module. It is registered by an entry point, in this package's `setup.cfg` or in the
metadata of any other package:

```ini
[options.entry_points]
llm2slm.engines =
    toy = toy_package.toy:ToyEngine
```

or at run time with [`register_engine`]. Nothing else has to change: loading, `llm2slm export --engine` and
`llm2slm benchmark` find engines here.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ..files_llm2slm import first_line
from ..settings import LENGTH, TARGET_LENGTH, check_value
from ..states.fingerprints import checkpoint_fingerprint
from ..states.store import StateStore


logger = logging.getLogger(__name__)

ENTRY_POINTS = "llm2slm.engines"
DEFAULT = "pytorch"  # loads every checkpoint that no other engine claims
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """
    How an engine loads a checkpoint.

    Args:
        dtype: dtype of the weights. Default: float32, whatever dtype they were saved in; the LLM of an LLM-to-SLM
            model keeps a dtype of its own.
        device: Where to put the model. Default: the CPU.
        prompt_max_length: Truncate prompts to this many tokens. Default: the checkpoint's limit, or never.
        target_max_length: Truncate targets, and limit outputs, to this many tokens. Default: likewise.
        states: For an LLM-to-SLM model: a store of the LLM's hidden states. The LLM itself is not loaded.
        quantize: Quantize the weights: `"int8"` or `"nf4"`, see [`quantize`]. The model can then only generate.
        keep_llm_dtype: For an LLM-to-SLM model: a frozen LLM keeps the dtype it was saved in, also where that is the
            SLM's dtype. An LLM that trains is loaded in `dtype`, like the SLM.
        allow_nonfinite: Also load a model with weights that are not finite.
    """

    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    prompt_max_length: int | None = None
    target_max_length: int | None = None
    states: StateStore | None = None
    quantize: str | None = None
    keep_llm_dtype: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        check_value("prompt_max_length", self.prompt_max_length, LENGTH, int | None)
        check_value("target_max_length", self.target_max_length, TARGET_LENGTH, int | None)


@dataclass(frozen=True)
class WeightFormat:
    """
    A format in which an exported model stores its weights.

    Args:
        bytes: Bytes of a weight.
        tolerance: Largest difference from PyTorch's logits, as a part of the largest logit.
    """

    bytes: float
    tolerance: float


@dataclass(frozen=True)
class BenchmarkModels:
    """
    The checkpoints that a benchmark compares.

    Args:
        folder: Folder that contestants write to.
        llm: The LLM with its decoder, a folder or a name on the Hub.
        llm2slm: The LLM-to-SLM model, a folder or a name on the Hub.
    """

    folder: Path
    llm: str
    llm2slm: str


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """
    A model on an engine, to be timed by `llm2slm benchmark`.

    Args:
        load: Loads the model on a device, from the checkpoints and the folder where `make` wrote. It returns a model
            with transformers' `generate()`, which is timed token by token, or a function
            `(prompt ids (B, N), new_tokens, num_beams)`, which is timed as a whole. Neither may end early.
        make: Writes what `load` needs to an empty folder, once. Default: `load` reads the checkpoints.
        model: The timed model: the LLM, the SLM alone, or LLM-to-SLM.
        beams: Whether it has beam search. Without, cells with beams leave it out.
        bits: Size on a CPU of the weights that each token reads.
        step_bytes: Returns the bytes that each token reads, given the folder that `make` wrote. Default: `bits` tells.
        packages: Packages that it needs.
    """

    load: Callable[[BenchmarkModels, Path, str], Any]
    make: Callable[[BenchmarkModels, Path], None] | None = None
    model: Literal["llm", "slm", "llm2slm"] = "llm2slm"
    beams: bool = True
    bits: int = 32
    step_bytes: Callable[[Path], int] | None = None
    packages: tuple[str, ...] = ()

    @property
    def can_run(self) -> bool:
        """Whether its packages are installed."""
        return all(map(is_installed, self.packages))

    def check_installed(self, name: str) -> None:
        """Raise `ImportError` with the `pip` command if one of its packages is missing; `name` is its own name."""
        for package in self.packages:
            if not is_installed(package):
                raise ImportError(f"{package} is not installed, which {name} needs. Try: pip install {package}")


class Engine(ABC):
    """
    Computes models. A subclass is created without arguments, and imports its packages inside its methods.

    Attributes:
        name: Its name in `--engine` and in messages.
        packages: Packages that it needs, as `pip` names them.
        extra: The extra of this package that installs them; empty if no extra does.
        weights: The formats in which [`~Engine.export`] stores weights; empty if the engine exports nothing.
        files: Patterns of the names of the files that decide outputs, besides `config.json` and
            `generation_config.json`. An interrupted run resumes only if these files have not changed. Default: all
            files.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    weights: ClassVar[Mapping[str, WeightFormat]] = {}
    files: ClassVar[tuple[str, ...]] = ("*",)

    @abstractmethod
    def can_load(self, path: str | Path) -> bool:
        """
        Return whether `path` holds a model in this engine's own format.

        An engine that reads ordinary checkpoints returns `False`: they are loaded with PyTorch, unless the caller asks
        for the engine by name, `engine("name").load(path, options)`.
        """

    @abstractmethod
    def load(self, path: str | Path, options: LoadOptions) -> Any:
        """
        Load a model.

        Args:
            path: A folder, or a name on the Hub.
            options: How to load it. Raise `ValueError` for an option that the engine does not support.

        Returns:
            A [`TextToText`]. One of its subclasses wraps a model with transformers' `generate()`. An engine with a
            loop of its own returns a subclass of `TextToText` that overrides `read` (prompts to anything, such as
            prompt embeddings), `write` (that to token ids) and `stream`.

        Raises:
            ImportError: If its packages are not installed.
            OSError: If the model is damaged or incomplete.
        """

    def export(self, model: Any, folder: Path, weights: str, progress: Progress = lambda stage: None) -> Any:
        """
        Write an LLM-to-SLM model in the engine's own format, which [`~Engine.can_load`] recognizes.

        Args:
            model: The [`LLM2SLMForConditionalGeneration`], in float32 on the CPU. It may be changed.
            folder: An empty folder. The caller adds the processor.
            weights: One of `self.weights`.
            progress: Called with a few words at every step.

        Returns:
            The written model, loaded from `folder`. The caller compares its [`~Engine.output_logits`] with those of
            `model`.
        """
        raise NotImplementedError(f"{self.name} exports nothing.")

    def output_logits(self, model: Any, prompt: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """
        Return the logits `(1, M, vocabulary)` that follow each token of an output.

        Args:
            model: The result of [`~Engine.export`]. Override this method unless the model has the `forward()` of
                [`LLM2SLMForConditionalGeneration`].
            prompt: Prompt token ids `(1, N)`.
            output: Output token ids `(1, M)`.
        """
        return model(input_ids=prompt, decoder_input_ids=output).logits

    def contestants(self) -> Mapping[str, Contestant]:
        """Return the contestants that the engine adds to `llm2slm benchmark`, by name."""
        return {}

    def check_installed(self, *more: str) -> None:
        """Raise `ImportError` with the `pip` command if a package of the engine, or one of `more`, is missing."""
        for package in (*self.packages, *more):
            if not is_installed(package):
                command = f"modeling-llm2slm[{self.extra}]" if self.extra else package
                raise ImportError(f"{package} is not installed. Try: pip install '{command}'")

    def check_export(self, weights: str) -> None:
        """Raise `ValueError` if the engine cannot export these weights, and `ImportError` if a package is missing."""
        if weights not in self.weights:
            raise ValueError(f"{self.name} has no {weights!r} weights. Choose one of: {', '.join(self.weights)}.")
        self.check_installed()


_registered: dict[str, Engine] = {}


def register_engine(engine: Engine) -> None:
    """Register an engine for this process, in place of any other of its name."""
    _registered[engine.name] = engine


def engines() -> dict[str, Engine]:
    """Return all engines that can be imported by name, PyTorch first."""
    installed, broken = _installed_engines()
    found = installed | _registered
    if DEFAULT in broken:
        raise _import_error(DEFAULT, broken[DEFAULT])
    if DEFAULT not in found:
        raise ImportError("modeling-llm2slm was installed without its entry points. Install it again with pip.")
    return dict(sorted(found.items(), key=lambda item: (item[0] != DEFAULT, item[0])))


def engine(name: str) -> Engine:
    """Return the engine of this name; `ValueError` if it does not exist, `ImportError` if it cannot be imported."""
    return _choose(name, engines(), "does not exist")


def exporting_engine(name: str) -> Engine:
    """Return the engine of this name, like [`engine`]; `ValueError` also if it does not export."""
    return _choose(name, {name: engine for name, engine in engines().items() if engine.weights}, "does not export")


def engine_of(path: str | Path) -> Engine:
    """Return the engine that loads a checkpoint: the one that claims its format, or else PyTorch."""
    found = engines()
    default = found.pop(DEFAULT)
    return next((engine for engine in found.values() if engine.can_load(path)), default)


def fingerprint_of(path: str | Path) -> str:
    """Return [`checkpoint_fingerprint`] of a checkpoint, over the files that its engine reads."""
    return checkpoint_fingerprint(path, engine_of(path).files)


def is_installed(package: str) -> bool:
    """Return whether a package is installed, by its name on the package index."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _choose(name: str, found: Mapping[str, Engine], problem: str) -> Engine:
    if name in found:
        return found[name]
    broken = _installed_engines()[1]
    if name in broken and name not in _registered:
        raise _import_error(name, broken[name])
    raise ValueError(f"Engine {name!r} {problem}. Choose one of: {', '.join(found)}.")


def _import_error(name: str, cause: Exception) -> ImportError:
    error = ImportError(f"Engine {name!r} cannot be loaded: {first_line(cause)}")
    error.__cause__ = cause
    return error


@functools.cache
def _installed_engines() -> tuple[dict[str, Engine], dict[str, Exception]]:
    """Return the engines of all entry points by name, and the errors of those that cannot be imported."""
    found: dict[str, Engine] = {}
    broken: dict[str, Exception] = {}
    for point in entry_points(group=ENTRY_POINTS):
        try:
            found[point.name] = point.load()()
        except Exception as error:  # another package's module may raise anything
            logger.warning(f"Engine {point.name!r} is left out: it cannot be loaded ({first_line(error)}).")
            broken[point.name] = error
    return found, broken
