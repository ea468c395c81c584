"""What is uploaded: the sdist and the wheel, built, installed into an empty environment, and run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from harness import REPOSITORY
from lightning_eff import __version__

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None

BUILD = """
import os, sys
from hatchling.build import build_sdist, build_wheel
os.chdir(sys.argv[1])
print(build_sdist(sys.argv[2]) if sys.argv[3] == "sdist" else build_wheel(sys.argv[2]))
"""


def run(*command: object, **arguments) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of the tree, and the wheel of that sdist, as `python -m build` makes them."""
    folder = tmp_path_factory.mktemp("package")
    tools = folder / "tools"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", tools]
    if subprocess.run([*map(str, pip), "hatchling"], capture_output=True, timeout=300).returncode:
        pytest.skip("hatchling, which builds the package, cannot be installed here")
    environment = {**os.environ, "PYTHONPATH": str(tools)}
    sdist = run(sys.executable, "-c", BUILD, REPOSITORY, folder, "sdist", env=environment).strip()
    (folder / "unpacked").mkdir()
    run("tar", "-xzf", folder / sdist, "-C", folder / "unpacked")
    (tree,) = (folder / "unpacked").iterdir()
    wheel = run(sys.executable, "-c", BUILD, tree, folder, "wheel", env=environment).strip()
    if kept := os.environ.get("DIST"):  # `make test-package DIST=dist`: what is uploaded is what is tried here
        (REPOSITORY / kept).mkdir(parents=True, exist_ok=True)
        for name in (sdist, wheel):
            shutil.copy(folder / name, REPOSITORY / kept / name)
    return folder / sdist, folder / wheel


def test_lines_to_install_are_of_a_checkout_until_there_is_an_upload():
    """`docs/releasing.md` says when they change; that of an extra, with the package installed, is true in any case."""
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")]
    for page in pages:
        for what in re.findall(r"^\$ pip install (\S+)", page.read_text(), re.MULTILINE):
            assert what.strip("'").startswith(".["), page


@pytest.mark.slow
def test_the_sdist_has_what_a_wheel_needs_and_no_more(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "lightning_eff/py.typed"} <= names
    assert {name.split("/")[0] for name in names} <= {
        *("README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", "lightning_eff", ".gitignore")
    }


@pytest.mark.slow
def test_the_wheel_is_the_package(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        said = archive.read(metadata).decode()
        (entries,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        commands = archive.read(entries).decode()
    tree = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "lightning_eff").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if ".dist-info/" not in name} == tree
    assert f"\nVersion: {__version__}\n" in said
    assert "\nRequires-Python: >=3.10\n" in said
    assert "lightning-eff = lightning_eff.cli:main" in commands
    if tomllib is not None:
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        lines = [line for line in said.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
        required = {re.match(r"Requires-Dist: ([\w-]+)", line)[1] for line in lines}
        assert required == {re.match(r"[\w-]+", line)[0].replace("_", "-") for line in project["dependencies"]}


@pytest.mark.slow
def test_it_works_in_an_empty_environment(built, tmp_path):
    """The package is the wheel's; only what it depends on is this environment's, by a path, so nothing is fetched."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[1])
    (packages,) = environment.glob("lib/python*/site-packages")
    here = Path(os.__file__).parents[0]
    own = [path for path in sys.path if path.endswith("site-packages") and Path(path) != here]
    (packages / "dependencies.pth").write_text("\n".join(own))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def inside(*command: object) -> str:
        return run(*command, cwd=tmp_path, env=clean)

    where = inside(python, "-c", "import lightning_eff; print(lightning_eff.__file__)").strip()
    assert Path(where).is_relative_to(environment)
    assert inside(environment / "bin" / "lightning-eff", "--version") == f"lightning-eff {__version__}\n"
    assert "Everything that is required is there." in inside(environment / "bin" / "lightning-eff", "doctor")
    fit = (
        "import lightning as L; from lightning.pytorch.demos.boring_classes import BoringModel; import lightning_eff; "
    )
    fit += "t = L.Trainer(max_steps=2, callbacks=lightning_eff.recipe('pretrain', 20, resumable=False), logger=False, "
    fit += "enable_checkpointing=False, accelerator='cpu'); t.fit(BoringModel()); print('step', t.global_step)"
    assert "step 2\n" in inside(python, "-c", fit)
