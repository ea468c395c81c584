"""The notebooks run from their first cell to the last: by a kernel where there is one, else as a script."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from harness import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "examples" / "notebooks").glob("*.ipynb"))

BY_A_KERNEL = """
import sys, nbformat
from nbclient import NotebookClient
NotebookClient(nbformat.read(sys.argv[1], 4), timeout=150, resources={"metadata": {"path": "."}}).execute()
"""


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs_and_its_links_lead_somewhere(path):
    assert len(cells(path, "code")) >= 3
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        compile("".join(cell["source"]), path.name, "exec")
    for cell in cells(path, "markdown"):
        for link in "".join(cell["source"]).split("](")[1:]:
            assert (path.parent / link.partition(")")[0]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    if find_spec("nbclient") and find_spec("ipykernel"):
        line = ["-c", BY_A_KERNEL, path.name]
    else:
        script = tmp_path / f"{path.stem}.py"
        script.write_text("\n\n".join("".join(cell["source"]) for cell in cells(path, "code")))
        line = [str(script)]
    environment = {**os.environ, "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *line], cwd=path.parent, env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr[-3000:]
