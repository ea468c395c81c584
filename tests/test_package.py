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
from hatch_build import absolute_links, project_urls
from lightning_eff import __version__

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None

URL = "https://example.invalid/owner/name"
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
def tools(tmp_path_factory) -> Path:
    """A folder with what builds the package, for ``PYTHONPATH``."""
    folder = tmp_path_factory.mktemp("tools")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", folder]
    if subprocess.run([*map(str, pip), "hatchling"], capture_output=True, timeout=300).returncode:
        pytest.skip("hatchling, which builds the package, cannot be installed here")
    return folder


def build(folder: Path, tools: Path, **variables: str) -> tuple[Path, Path]:
    """The sdist of the tree, and the wheel of that sdist, as `python -m build` makes them.

    The variables are for the sdist alone: what is in it is to be enough for the wheel.
    """
    environment = {**os.environ, "PYTHONPATH": str(tools)}
    sdist = run(sys.executable, "-c", BUILD, REPOSITORY, folder, "sdist", env={**environment, **variables}).strip()
    (folder / "unpacked").mkdir()
    run("tar", "-xzf", folder / sdist, "-C", folder / "unpacked")
    (tree,) = (folder / "unpacked").iterdir()
    environment.pop("PROJECT_URL", None)
    wheel = run(sys.executable, "-c", BUILD, tree, folder, "wheel", env=environment).strip()
    return folder / sdist, folder / wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory, tools) -> tuple[Path, Path]:
    """Both, of the environment as it is: in a release `PROJECT_URL` is set."""
    found = build(tmp_path_factory.mktemp("package"), tools)
    if kept := os.environ.get("DIST"):  # `make test-package DIST=dist`: what is uploaded is what is tried here
        (REPOSITORY / kept).mkdir(parents=True, exist_ok=True)
        for path in found:
            shutil.copy(path, REPOSITORY / kept / path.name)
    return found


def metadata_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return archive.read(metadata).decode()


def test_lines_to_install_are_of_a_checkout_until_there_is_an_upload():
    """`docs/releasing.md` says when they change; that of an extra, with the package installed, is true in any case."""
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")]
    for page in pages:
        for what in re.findall(r"^\$ pip install (\S+)", page.read_text(), re.MULTILINE):
            assert what.strip("'").startswith(".["), page


def test_links_of_readme_lead_to_this_version_of_the_repository():
    """Every one, on an index that shows README alone; what they lead to is a file of this repository."""
    readme = (REPOSITORY / "README.md").read_text()
    text = absolute_links(readme, URL, __version__)
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert len(targets) == len(re.findall(r"\]\(([^)]*)\)", readme)) > 30
    assert [target for target in targets if not target.startswith("https://")] == []
    own = [target.removeprefix(URL) for target in targets if target.startswith(URL)]
    assert len(own) > 30
    for target in own:
        kind, version, path = re.fullmatch(r"/(blob|raw)/v([^/]+)/([^#]+)(?:#.*)?", target).groups()
        assert (kind == "raw", version) == (path.endswith(".png"), __version__)
        assert (REPOSITORY / path).is_file(), target
    assert text.count("/raw/") == readme.count("![") > 0
    # Nothing else has changed: what is no link is as it was.
    assert re.sub(rf"{re.escape(URL)}/(blob|raw)/v{re.escape(__version__)}/", "", text) == readme


def test_links_that_lead_elsewhere_and_code_stay_as_they_are():
    text = "[a](https://b.c/d) [e](#f) `[g](h)` [`i`](j.md#k) ![l](m.png)\n```\n[n](o)\n```\n[p\nq](r)\n"
    assert absolute_links(text, URL, "1") == (
        f"[a](https://b.c/d) [e](#f) `[g](h)` [`i`]({URL}/blob/v1/j.md#k) ![l]({URL}/raw/v1/m.png)\n"
        f"```\n[n](o)\n```\n[p\nq]({URL}/blob/v1/r)\n"
    )


def test_addresses_of_the_project_are_those_of_files_that_are_there():
    for target in project_urls(URL, "1").values():
        path = target.removeprefix(URL)
        if "/blob/" in path:
            assert (REPOSITORY / path.removeprefix("/blob/v1/")).is_file()
        else:
            assert path in ("", "/tree/v1", "/issues")


@pytest.mark.slow
def test_a_release_knows_its_address_and_a_wheel_of_its_sdist_too(tmp_path, tools):
    _, wheel = build(tmp_path, tools, PROJECT_URL=f"{URL}/")
    said = metadata_of(wheel)
    headers, _, readme = said.partition("\n\n")
    assert dict(line.removeprefix("Project-URL: ").split(", ") for line in headers.splitlines()
                if line.startswith("Project-URL: ")) == project_urls(URL, __version__)  # fmt: skip
    assert "Description-Content-Type: text/markdown" in headers
    assert "Dynamic:" not in headers
    assert readme.strip() == absolute_links((REPOSITORY / "README.md").read_text(), URL, __version__).strip()


@pytest.mark.slow
def test_an_address_that_is_none_ends_the_build(tmp_path, tools):
    environment = {**os.environ, "PYTHONPATH": str(tools), "PROJECT_URL": "owner/name"}
    command = [sys.executable, "-c", BUILD, str(REPOSITORY), str(tmp_path), "sdist"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "PROJECT_URL must be https://host/owner/name, but it is 'owner/name'" in done.stderr


@pytest.mark.slow
def test_the_sdist_has_what_a_wheel_needs_and_no_more(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    needed = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "hatch_build.py"}
    assert {*needed, "lightning_eff/py.typed"} <= names
    assert {name.split("/")[0] for name in names} <= {*needed, "PKG-INFO", "lightning_eff", ".gitignore"}


@pytest.mark.slow
def test_the_wheel_is_the_package(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        (entries,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        commands = archive.read(entries).decode()
    said = metadata_of(built[1])
    assert "\nDynamic: " not in said.partition("\n\n")[0]
    assert ("\nProject-URL: " in said) == bool(os.environ.get("PROJECT_URL"))
    if not os.environ.get("PROJECT_URL"):
        assert said.partition("\n\n")[2].strip() == (REPOSITORY / "README.md").read_text().strip()
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
