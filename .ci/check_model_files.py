"""
Run transformers-mlinter on the model files, with every rule except those in `EXCEPTIONS`.

mlinter's command line cannot disable rules, so this script calls its public Python interface. It needs neither a
network nor a checkout of transformers.
"""

import sys
from pathlib import Path

from mlinter import DEFAULT_ENABLED_TRF_RULES, analyze_file, format_violation
from rich import print as rich_print


# The rules that a model outside transformers' own repository cannot meet. Fix every other finding.
EXCEPTIONS = {
    "TRF014": "bans `trust_remote_code`, but a composite of two checkpoints passes the caller's choice to both",
    "TRF038": "wants tests/models/<model>/ of the transformers repository; ours mirror our own tree",
    "TRF057": "wants @auto_docstring, which finds its texts by the file's place inside transformers",
}


def main(paths: list[Path]) -> int:
    """Print every finding in the files, and return the number of findings."""
    rules = DEFAULT_ENABLED_TRF_RULES - EXCEPTIONS.keys()
    findings = [
        finding
        for path in paths
        for finding in analyze_file(path, path.read_text(encoding="utf-8"), enabled_rules=rules)
    ]
    for finding in findings:
        rich_print(format_violation(finding), file=sys.stderr)
    rich_print(f"mlinter: {len(rules)} rules, {len(paths)} files, {len(findings)} findings")
    return len(findings)


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]) != 0)
