"""Plots of the result of `llm2slm benchmark`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data.atomic import atomic_write
from ..inference.engine import is_installed


PLOTS = ("time.svg", "speed-up.svg", "throughput.svg")


def check_installed() -> None:
    """Raise `ImportError`, before anything is measured, if the package that plots is missing."""
    if not is_installed("matplotlib"):
        raise ImportError("matplotlib is not installed. Try: pip install 'modeling-llm2slm[benchmark]'")


def plot(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """
    Write `time.svg` (seconds by output length), `speed-up.svg` (by prompt length) and `throughput.svg` (tokens per
    second by batch size), each from the cells that differ in nothing else.

    Args:
        result: The result of [`Benchmark.run`].
        folder: The folder to write to.

    Returns:
        The files. A plot with fewer than two cells is not written.
    """
    cells = list(result["cells"].values())
    plots: list[tuple[str, str, str, Callable[..., float]]] = [
        ("output", "output length, tokens", "seconds per output", lambda cell, row: row["seconds"]),
        ("prompt", "prompt length, tokens", "times as fast as the LLM", _speed_up),
        ("batch", "batch size", "tokens per second", lambda cell, row: row["tokens_per_second"]),
    ]
    files = [_plot(cells, folder / name, *one) for name, one in zip(PLOTS, plots, strict=True)]
    return [file for file in files if file is not None]


def _speed_up(cell: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    return cell["results"]["llm"]["seconds"] / row["seconds"] if "llm" in cell["results"] else float("nan")


def _plot(
    cells: list[dict[str, Any]], file: Path, axis: str, x_label: str, y_label: str, value: Callable[..., float]
) -> Path | None:
    cells = _series(cells, axis)
    if len(cells) < 2:
        return None
    with drawing(file) as axes:
        for name in dict.fromkeys(name for cell in cells for name in cell["results"]):
            points = [(cell[axis], value(cell, cell["results"][name])) for cell in cells if name in cell["results"]]
            if len(points) > 1:
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
        if axis == "batch":
            axes.set_xscale("log", base=2)
    return file


@contextmanager
def drawing(file: Path) -> Iterator[Any]:
    """Yield axes to draw on, and write them to an SVG file. The same plot gives the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "llm2slm"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    yield axes
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _series(cells: list[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """Return the largest set of cells that differ in `axis` only, sorted by it; the first of equally large sets."""
    groups: dict[tuple, list[dict[str, Any]]] = {(): []}
    for cell in cells:
        key = tuple(cell[name] for name in ("preset", "prompt", "output", "batch", "beams") if name != axis)
        groups.setdefault(key, []).append(cell)
    longest: list[dict[str, Any]] = max(list(groups.values()), key=len)
    return sorted(longest, key=lambda cell: cell[axis])
