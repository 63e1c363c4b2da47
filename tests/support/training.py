"""What tests of trainings read from an output folder and from a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def losses(report: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in report["log"] if "loss" in row]
