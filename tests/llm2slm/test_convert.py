"""The group of commands `convert`."""

from __future__ import annotations

from tests.support.commands import run


def test_conversions_print_one_table(composite, tmp_path, capsys):
    assert run("convert", "split", composite, tmp_path / "parts") == 0
    printed = capsys.readouterr().out
    assert "logits of the SLM, largest difference" in printed
    assert "projector.linear_1.weight" in printed
    assert run("generate", tmp_path / "parts" / "slm", "src1", "--max-new-tokens", 2) == 0
    assert run("convert", "split", composite, tmp_path / "parts") == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert run("convert", "split", composite, tmp_path / "parts", "--overwrite") == 0
