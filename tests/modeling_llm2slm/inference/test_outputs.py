"""Stored outputs of interrupted runs: `OutputParts`, used by several processes at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeling_llm2slm.inference.outputs import OutputParts, one_line, warn_of_blank_outputs


def test_outputs_of_all_processes_are_read(tmp_path: Path) -> None:
    settings = {"model": "a"}
    for rank in (0, 1):
        OutputParts(tmp_path / "outputs.txt", settings, rank).keep({f"key{rank}": f"text {rank}"})
    again = OutputParts(tmp_path / "outputs.txt", settings)
    assert again.outputs == {"key0": "text 0", "key1": "text 1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs.txt.part", "outputs.txt.part-1"]


def test_files_removed_by_another_process_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = OutputParts(tmp_path / "outputs.txt", {})
    removed = tmp_path / "outputs.txt.part"
    parts.keep({"key": "text"})
    monkeypatch.setattr(parts, "_paths", lambda: [removed, removed])  # the second time, it is gone
    parts.remove()
    assert not removed.exists()
    assert OutputParts(tmp_path / "outputs.txt", {}).outputs == {}


def test_line_ends_of_every_kind_become_spaces() -> None:
    assert one_line("a\rb\r\nc\x0bd\x85e\u2028f\n") == "a b c d e f "


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [b"my notes\n", b"no line end", b"\xff\n"])
def test_a_file_of_somebody_else_is_not_taken_for_parts(tmp_path: Path, content: bytes, overwrite: bool) -> None:
    part = tmp_path / "outputs.txt.part"
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"outputs\.txt\.part is not an unfinished output of an earlier run"):
        OutputParts(tmp_path / "outputs.txt", {"seed": 1}, overwrite=overwrite)
    assert part.read_bytes() == content


@pytest.mark.parametrize(("seed", "kept"), [(1, {"a": "b"}), (2, {})])
def test_parts_of_the_same_settings_are_resumed_even_to_overwrite(
    tmp_path: Path, seed: int, kept: dict[str, str]
) -> None:
    OutputParts(tmp_path / "outputs.txt", {"seed": 1}).keep({"a": "b"})
    assert OutputParts(tmp_path / "outputs.txt", {"seed": seed}, overwrite=True).outputs == kept


def test_blank_outputs_are_counted_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_blank_outputs(["a", "b c"])
    assert not caplog.records
    warn_of_blank_outputs(["a", "", " \n\t", "\u2003"])
    (record,) = caplog.records
    assert record.getMessage().startswith("3 of 4 outputs are blank. Likely causes: the model is not trained, ")
    warn_of_blank_outputs([""])
    assert caplog.records[1].getMessage().startswith("1 of 1 outputs is blank.")
