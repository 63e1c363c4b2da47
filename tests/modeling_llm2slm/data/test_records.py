"""Records of a run."""

from __future__ import annotations

import torch

from modeling_llm2slm.data.records import versions


def test_versions_are_the_installed_ones() -> None:
    assert versions()["torch"] == torch.__version__
