"""Code in a process of its own: with another Hub than the tests', or without this package."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement


# No .pth files are read, so that no editable install is found.
ONLY_TRANSFORMERS = """
import sys
sys.path.append({folder!r})
import importlib.util
assert not any(map(importlib.util.find_spec, {absent!r}))
"""


# Each piece has names of its own, as a script has.
EACH = """
import contextlib, io, json, traceback
found = {{}}
for name, code in {codes!r}.items():
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {{"__name__": "__main__"}})
        found[name] = json.loads(printed.getvalue().splitlines()[-1])
    except Exception:
        found[name] = traceback.format_exc()
print(json.dumps(found))
"""


@functools.cache
def only_transformers(*more: str) -> str:
    """A folder of links to torch, transformers, `more` and what they require, as in an environment of their own."""
    folder, wanted = Path(tempfile.mkdtemp(prefix="only-transformers-")), ["torch", "transformers", *more]
    seen: set[str] = set()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # a requirement of another platform
            continue
        requirements = map(Requirement, distribution.requires or [])
        wanted += [need.name for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]
        for entry in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (folder / entry).exists():
                (folder / entry).symlink_to(Path(str(distribution.locate_file(entry))))
    return str(folder)


def start(code: str, package: bool = True, more: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    """Start Python code; without the package there is only what transformers and `more` need."""
    flags = []
    if not package:
        absent = ["modeling_llm2slm", "llm2slm", "datasets", *([] if more else ["peft", "accelerate"])]
        flags = ["-I", "-S"]
        code = ONLY_TRANSFORMERS.format(folder=only_transformers(*more), absent=absent) + code
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *flags, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code: str, package: bool = True, more: tuple[str, ...] = (), **environment: str) -> Any:
    """What the code prints on its last line, as JSON."""
    process = start(code, package, more, **environment)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1])


def run_each(codes: Mapping[str, str], **options: Any) -> dict[str, Any]:
    """
    Run pieces of code one after the other in one process, as a start takes seconds. Return what each prints on its
    last line, as JSON; of one that fails, its traceback.
    """
    return run(EACH.format(codes=dict(codes)), **options)
