"""Values that a hostile or unlucky user gives to a setting, as hypothesis cases them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


class Strange:
    """An object that no setting takes."""

    def __repr__(self) -> str:
        return "<a strange object>"


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# What a command line can give.
TEXTS = (
    "", " ", "0", "-1", "1", "3", "1.5", "1e-3", "nan", "inf", "-inf", "1e400", "1e-300", "10" * 20, "9" * 5000, "-0",
    "true", "x", "é", "x" * 10_000, "{}", "[]", "{a: 1}", "[" * 5000, "${X", "(", "*", "a=b", ".", "no/x", "no.jsonl",
    "{r: x}", "[[1]]", "1_000", "0x10", "None", "2026-11-29", "5GB", "-", "--x", "'", "\t", "{a: {b: [}}",
)  # fmt: skip
# What JSON, YAML and a command line can give.
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((0, -1, 1, 2, 7, 2**31, 2**32, 2**63, -(2**63), 10**30, 10**5000, -(10**5000))),
    st.integers(),
    st.sampled_from((math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 1e-300, 5e-324, 1e300, -1.5, 0.5)),
    st.floats(),
    st.sampled_from((
        "", " ", "3", "-1", "1e-3", "nan", "inf", "1.0", "true", "x", "cpu", "cuda:1", "bfloat16", "1GB", "no", "none",
        "all", "a\0b", "\ud83d", "é", "x" * 100_000, "{}", "{a: 1}", "[", "[1, 2]", "[" * 5000, "{r: 8}", "${X", "(",
        "*", "{num_beams: 2}", "/", "..", "~", "9" * 5000,
    )),
    st.text(max_size=20),
    st.sampled_from(([], {}, [[]], {"": ""}, ["a"], ["a", "a"], [1], [None], {"a": {"b": [1]}}, {1: 2})),
    st.just(_nested(2000)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=5,
    ),
)  # fmt: skip
# What Python code can give as well.
ANY = PLAIN | st.sampled_from((b"x", (), (1, 2), {1}, 1j, int, print, Strange(), Path("x"), range(3)))
