"""Workers of a Ray cluster: batches of work go out, and results come back to the one process that writes."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from ..files_llm2slm import first_line
from ..settings import RaySettings


logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def connected(settings: RaySettings, device: str) -> Iterator[Workers | None]:
    """
    Connect to a Ray cluster.

    Args:
        settings: The cluster and its workers.
        device: Where a worker computes; with `"cuda"`, it gets a GPU.

    Yields:
        The workers, or `None` if no cluster is asked for.

    Raises:
        ImportError: If Ray is not installed.
        OSError: If there is no cluster at the address.
    """
    if settings.ray is None:
        yield None
        return
    ray = _import_ray()
    is_own = not ray.is_initialized()
    log = logging.getLogger("ray.data")
    level = log.level
    try:
        if is_own:
            ray.init(settings.ray or None, log_to_driver=False, logging_level=logging.ERROR)
        log.setLevel(logging.ERROR)  # the command has its own line of progress
        yield Workers(ray, settings, device)
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"The Ray cluster failed: {first_line(error)} What is done is kept: repeat the command"
        ) from error
    finally:
        log.setLevel(level)
        if is_own:
            ray.shutdown()


def _import_ray() -> ModuleType:
    # Read at import: below, its C++ side writes lines between those of progress.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("ray is not installed. Try: pip install 'modeling-llm2slm[ray]'") from error
    return ray


class Workers:
    """
    The workers of a connected cluster. Each is an actor of Ray Data.

    Args:
        ray: The module, connected.
        settings: How many workers there are, and the share of a node that each has.
        device: See [`connected`].
    """

    def __init__(self, ray: ModuleType, settings: RaySettings, device: str):
        self._ray = ray
        gpus = settings.ray_gpus if settings.ray_gpus is not None else float(device.startswith("cuda"))
        self._resources = {"num_cpus": settings.ray_cpus, "num_gpus": gpus}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fitting = [_fitting(node, self._resources) for node in nodes]
        if not any(fitting):
            logger.warning(
                f"No node of the Ray cluster has {settings.ray_cpus:g} CPUs and {gpus:g} GPUs for a worker: waiting "
                "for one. Lower --ray-cpus or --ray-gpus, or add a node."
            )
        self.count = settings.ray_workers or max(sum(fitting) if gpus else len(nodes), 1)

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function once, on one CPU of the cluster."""
        remote = self._ray.remote(num_cpus=1)(_call)
        return _opened(self._ray.get(remote.remote(function, arguments)))

    def map(
        self, make: Callable[..., Callable[[Item], Result]], arguments: Mapping[str, Any], items: Iterable[Item]
    ) -> Iterator[tuple[int, Result]]:
        """
        Compute each item on one of the workers.

        Args:
            make: Called once in each worker, with `arguments`: returns the function that computes an item.
            arguments: Keyword arguments of `make`.
            items: Whatever can be pickled.

        Yields:
            The index of an item and its result, in the order in which they are finished, each exactly once. The items
            of a worker that dies are computed by another one.

        Raises:
            Exception: What `make` or its function raises in a worker.
        """
        data = self._ray.data
        # One block for each item: Ray Data computes a block as a whole.
        blocks = [pa.table({"index": [index], "item": [pickle.dumps(item)]}) for index, item in enumerate(items)]
        if not blocks:
            return
        context = data.DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = False
        with data.DataContext.current(context):
            results = data.from_arrow(blocks).map_batches(
                _Worker,
                batch_size=1,
                fn_constructor_args=(make, dict(arguments)),
                compute=data.ActorPoolStrategy(min_size=1, max_size=self.count, initial_size=self.count),
                **self._resources,
            )
            for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
                for index, result in zip(batch["index"], batch["result"], strict=True):
                    yield int(index), _opened(result)


class _Worker:
    """Computes items in an actor. Its class is made with the first item, where an error reaches the other side."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], arguments: Mapping[str, Any]):
        self._make = lambda: make(**arguments)
        self._function: Callable[[Any], Any] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        results = [_call(self._compute, [item]) for item in batch["item"]]
        return {"index": batch["index"], "result": np.array(results, dtype=object)}

    def _compute(self, item: bytes) -> Any:
        if self._function is None:
            self._function = self._make()
        return self._function(pickle.loads(item))


def _call(function: Callable[..., Any], arguments: Iterable[Any]) -> bytes:
    """Return what a function returns or raises. Ray would wrap an exception, and Ray Data drop its cause."""
    try:
        return pickle.dumps((function(*arguments), None))
    except Exception as error:
        try:
            pickle.loads(content := pickle.dumps((None, error)))
        except Exception:  # an exception that takes other arguments than its message
            return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {first_line(error)}")))
        return content


def _opened(content: bytes) -> Any:
    result, error = pickle.loads(content)
    if error is not None:
        raise error
    return result


def _fitting(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """Return how many workers a node has resources for."""
    shares = [node.get(name, 0) / needs[key] for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")) if needs[key]]
    return int(min(shares))


def path_for_workers(path: str | Path) -> str:
    """Return the absolute path of a file or folder, as a worker has another current directory; a name as it is."""
    return str(Path(path).expanduser().absolute()) if Path(path).expanduser().exists() else str(path)
