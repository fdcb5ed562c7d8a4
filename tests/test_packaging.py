"""What a user gets: the wheel, built from the sdist, in an environment that has never seen the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import mamba_ops

pytest.importorskip("build.env", reason="building the wheel needs the package `build`")

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def succeed(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


BUILD = (sys.executable, "-m", "build", "--no-isolation")


def copy_checkout(checkout: Path) -> Path:
    """Copy what a build reads: what an earlier one left in the real checkout must not leak in."""
    for name in ("mamba_ops", "registry"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "mamba_ops_pytest.py"):
        shutil.copy(ROOT / name, checkout)
    return checkout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    succeed(*BUILD, "--outdir", folder, copy_checkout(folder / "checkout"), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    [wheel] = dist.glob("*.whl")
    return wheel


def install(release: Path, folder: Path) -> Path:
    """Return the scripts of a new venv that has a release and, for torch, sees the packages that these tests run on."""
    venv.create(folder, symlinks=True)
    # A path in a .pth file is searched, but the .pth files in it are not run: the editable install stays out of sight.
    [site_packages] = folder.glob("lib/python*/site-packages")
    (site_packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    succeed(*pip, "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", release, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def bin_of_clean_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("venv"))


def files_of(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix in (".cpp", ".h", ".j2", ".json", ".py", ".typed") and "__pycache__" not in path.parts
    }


def everything() -> set[str]:
    package = {name for name in files_of(ROOT / "mamba_ops") if not name.startswith("registry/")}
    package |= {f"registry/{name}" for name in files_of(ROOT / "registry")}
    return {"mamba_ops_pytest.py", *(f"mamba_ops/{name}" for name in package)}


def test_the_checkout_links_to_the_registry():
    link = ROOT / "mamba_ops" / "registry"
    assert link.is_symlink()
    assert link.readlink() == Path("../registry")


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert "mamba_ops/py.typed" in names
    assert "mamba_ops/registry/__init__.py" in names
    assert any(re.fullmatch(r"mamba_ops/ops/_triton/configs/.+\.json", name) for name in names)
    assert names == everything()
    assert wheel.name.split("-")[1] == mamba_ops.__version__


def test_what_an_index_shows_has_no_link_that_leads_nowhere(wheel: Path):
    [name] = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    headers, _, shown = zipfile.ZipFile(wheel).read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in headers
    links = re.findall(r"\]\(([^)]+)\)", shown)
    assert len(links) == (ROOT / "README.md").read_text(encoding="utf-8").count("](") > 10
    repository = re.search(r"^Project-URL: Repository, (.+)$", headers, re.MULTILINE)[1]
    of_file = re.compile(rf"{re.escape(repository)}/(?:blob|raw)/main/(.+)")  # a picture needs the file itself
    assert not [link for link in links if not of_file.fullmatch(link)]
    assert not [link for link in links if not (ROOT / of_file.fullmatch(link)[1]).exists()]


def test_the_sdist_holds_real_files(dist: Path):
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive}
    assert everything() <= members.keys()
    assert all(member.isfile() or member.isdir() for member in members.values())
    assert not [name for name in members if name.startswith("tests")]  # they need the whole checkout


def test_the_wheel_works_where_there_is_no_checkout(bin_of_clean_venv: Path, tmp_path: Path):
    code = "import mamba_ops; print(mamba_ops.__file__); print(*mamba_ops.registry.ops())"
    path, ops = succeed(bin_of_clean_venv / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(path).is_relative_to(bin_of_clean_venv.parent)
    assert "selective_state_update" in ops.split()


def test_the_wheel_brings_the_command(bin_of_clean_venv: Path, tmp_path: Path):
    assert "demo" in succeed(bin_of_clean_venv / "mamba-ops", "--help", cwd=tmp_path)


def test_the_wheel_brings_the_fixture(bin_of_clean_venv: Path, tmp_path: Path):
    """And a run of pytest that does not ask for it does not load torch."""
    (tmp_path / "test_it.py").write_text("def test_it(): import sys; assert 'torch' not in sys.modules")
    pytest_ = (bin_of_clean_venv / "python", "-m", "pytest", "-p", "no:cacheprovider")
    assert "1 passed" in succeed(*pytest_, "-q", "test_it.py", cwd=tmp_path)
    assert "graph_audit" in succeed(*pytest_, "--fixtures", "test_it.py", cwd=tmp_path)


SMOKE = """
import pytest
from mamba_ops.registry import ops

@pytest.mark.parametrize("name", sorted(ops()))
def test_it_runs(name):
    sample = ops()[name].make_samples("cpu")[0]
    ops()[name](*sample.args, **sample.kwargs)
"""


def test_what_is_installed_runs_every_op(bin_of_clean_venv: Path, tmp_path: Path):
    (tmp_path / "test_smoke.py").write_text(SMOKE)
    command = (bin_of_clean_venv / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_smoke.py")
    assert f"{len(mamba_ops.registry.ops())} passed" in succeed(*command, cwd=tmp_path)


@pytest.mark.slow
def test_the_sdist_can_be_installed_itself(dist: Path, tmp_path: Path):
    [sdist] = dist.glob("*.tar.gz")
    scripts = install(sdist, tmp_path / "venv")
    assert "doctor" in succeed(scripts / "mamba-ops", "--help", cwd=tmp_path)
    test_what_is_installed_runs_every_op(scripts, tmp_path)
    shutil.copy(ROOT / "examples" / "decode_step.py", tmp_path)
    assert "graphs compiled for all of this: 1" in succeed(scripts / "python", "decode_step.py", cwd=tmp_path)


def test_the_wheel_has_no_module_called_registry(bin_of_clean_venv: Path, tmp_path: Path):
    assert (
        "No module named 'registry'" in run(bin_of_clean_venv / "python", "-c", "import registry", cwd=tmp_path).stderr
    )


@pytest.fixture
def checkout_without_link(tmp_path: Path) -> Path:
    """A checkout as git makes it where it makes no symbolic links, as on Windows: the link is a text file."""
    checkout = copy_checkout(tmp_path / "checkout")
    (checkout / "mamba_ops" / "registry").unlink()
    (checkout / "mamba_ops" / "registry").write_text("../registry")
    return checkout


def test_a_checkout_without_the_link_says_what_to_do(checkout_without_link: Path):
    done = run(sys.executable, "-c", "import mamba_ops", cwd=checkout_without_link)
    assert done.returncode == 1
    assert "ImportError: mamba_ops/registry is a text file in this checkout" in done.stderr
    assert "run `git config core.symlinks true`" in done.stderr


@pytest.mark.parametrize("what", ["--wheel", "--sdist"])
def test_a_checkout_without_the_link_builds_nothing(checkout_without_link: Path, what: str, tmp_path: Path):
    done = run(*BUILD, what, "--outdir", tmp_path / "dist", checkout_without_link, cwd=tmp_path)
    assert done.returncode == 1
    assert "mamba_ops/registry is no folder here" in done.stdout + done.stderr
    assert "run `git config core.symlinks true`" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.whl")) + list(tmp_path.rglob("*.tar.gz"))


def test_the_registry_refuses_the_name_of_its_folder():
    done = run(sys.executable, "-c", "import registry", cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError: this folder is imported as mamba_ops.registry, never as registry" in done.stderr
