"""Prints what pyproject.toml asks for, for `pip install -r`: the Dockerfile installs it before the
source is there, so that a change of the source builds in seconds. Words: extras."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *(line for name in sys.argv[1:] for line in extras[name])]
print(*(line for line in wanted if not line.startswith("slipstream[")), sep="\n")
