"""Plots of what `llm2slm benchmark` measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def plot(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """
    Writes `time.svg` (seconds against the length of the answer), `speed-up.svg` (against the length of the prompt) and
    `throughput.svg` (tokens per second against the batch), each from the cells that differ in nothing else.

    Args:
        result: What [`Benchmark.run`] returns.
        folder: Where to write to.

    Returns:
        The files. A plot that fewer than two cells can be found for is not written.
    """
    cells = list(result["cells"].values())
    plots: list[tuple[str, str, str, str, Callable[..., float]]] = [
        ("time.svg", "answer", "tokens of the answer", "seconds per answer", lambda cell, row: row["seconds"]),
        ("speed-up.svg", "prompt", "tokens of the prompt", "times as fast as the LLM", _speed_up),
        (
            "throughput.svg",
            "batch",
            "prompts at once",
            "tokens per second",
            lambda cell, row: row["tokens_per_second"],
        ),
    ]
    files = [_plot(cells, folder / name, axis, x, y, value) for name, axis, x, y, value in plots]
    return [file for file in files if file is not None]


def _speed_up(cell: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    return cell["results"]["llm"]["seconds"] / row["seconds"] if "llm" in cell["results"] else float("nan")


def _plot(
    cells: list[dict[str, Any]], file: Path, axis: str, x_label: str, y_label: str, value: Callable[..., float]
) -> Path | None:
    cells = _series(cells, axis)
    if len(cells) < 2:
        return None
    with drawn(file) as axes:
        for name in dict.fromkeys(name for cell in cells for name in cell["results"]):
            points = [(cell[axis], value(cell, cell["results"][name])) for cell in cells if name in cell["results"]]
            if len(points) > 1:
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
        if axis == "batch":
            axes.set_xscale("log", base=2)
    return file


@contextmanager
def drawn(file: Path) -> Iterator[Any]:
    """Axes to draw on, which become a file: of the same plot, the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "llm2slm"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    yield axes
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _series(cells: list[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """The largest set of cells that differ in `axis` alone, in its order; of equally large ones the first."""
    groups: dict[tuple, list[dict[str, Any]]] = {(): []}
    for cell in cells:
        key = tuple(cell[name] for name in ("preset", "prompt", "answer", "batch", "beams") if name != axis)
        groups.setdefault(key, []).append(cell)
    longest: list[dict[str, Any]] = max(list(groups.values()), key=len)
    return sorted(longest, key=lambda cell: cell[axis])
