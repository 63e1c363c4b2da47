"""Print the lowest declared version of every direct dependency in a setup.cfg, extras included, as constraints."""

import re
import sys
from configparser import ConfigParser
from pathlib import Path


REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*>=\s*(?P<version>[^,;\s]+)")


def lowest_versions(setup_cfg: Path) -> list[str]:
    """Return `name==version` lines, without the project's own extras; raise where a requirement has no lower bound."""
    config = ConfigParser()
    config.read_string(setup_cfg.read_text(encoding="utf-8"))
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    requirements = {line.strip() for text in texts for line in text.splitlines() if line.strip()}
    own = config["metadata"]["name"]
    pins = []
    for requirement in sorted(requirements):
        if requirement.startswith(f"{own}["):
            continue
        match = REQUIREMENT.match(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} in {setup_cfg} has no lower bound: write it as name>=version.")
        pins.append(f"{match['name']}=={match['version']}")
    return pins


if __name__ == "__main__":
    sys.stdout.write("\n".join(lowest_versions(Path(sys.argv[1]))) + "\n")
