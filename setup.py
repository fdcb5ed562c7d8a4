"""Refuses to build from a checkout without the symbolic link mamba_ops/registry: the wheel would lack the registry."""

from pathlib import Path

from setuptools import setup

if not (Path(__file__).parent / "mamba_ops" / "registry" / "__init__.py").is_file():
    raise SystemExit(
        "mamba_ops/registry is no folder here, and a package would lack it: git did not make the symbolic link; "
        "run `git config core.symlinks true`, on Windows with developer mode on, and check mamba_ops/registry out again"
    )

setup()
