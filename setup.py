"""Refuses to build from a checkout without the symbolic link mamba_ops/registry: the wheel would lack the registry.

And makes the description that a package index shows: README.md, with links that lead to the repository.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FILES = "https://github.com/mamba-ops/mamba-ops/blob/main/"
PICTURES = FILES.replace("/blob/", "/raw/")

if not (ROOT / "mamba_ops" / "registry" / "__init__.py").is_file():
    raise SystemExit(
        "mamba_ops/registry is no folder here, and a package would lack it: git did not make the symbolic link; "
        "run `git config core.symlinks true`, on Windows with developer mode on, and check mamba_ops/registry out again"
    )

readme = (ROOT / "README.md").read_text(encoding="utf-8")
readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\1{PICTURES}", readme)
setup(
    long_description=re.sub(r"\]\((?!https?:|#)", f"]({FILES}", readme),
    long_description_content_type="text/markdown",
)
