"""The tutorials run as they stand: files are written, commands run in their order, and what they print is compared.

A block of Python with a title is a file. A block `console` is run by bash: lines with `$` are commands, the others are
what they print, where `...` stands for anything and `Killed` for a death by SIGKILL. Others are for elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness import REPOSITORY

TUTORIALS = REPOSITORY / "docs" / "tutorials"
NEEDS = {
    "first_run": ["jsonargparse", "tensorboard"],
    "hugging_face": ["transformers", "peft"],
    "vision": ["timm", "sklearn"],
    "survive_a_kill": ["jsonargparse"],
    "several_machines": [],
    "fsdp2": ["jsonargparse"],
}

BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[tuple[str, list[str]]]:
    """The commands of a block, each with the lines that it prints."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def prints(lines: list[str], printed: str) -> bool:
    """Whether that is what was printed: every line, in its order, with `...` for anything, or for any lines."""
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else ".*?".join(map(re.escape, line.split("..."))) + r"\n" for line in lines
    )
    return re.fullmatch(pattern, printed) is not None


def run(page: Path, folder: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PL_", "LIGHTNING_EFF"))},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    ran = 0
    for language, title, block in BLOCK.findall(page.read_text()):
        if language == "python":
            assert title, f"{page.name}: a block of Python without a title is never run"
            (folder / title).write_text(block)
        elif language == "console":
            for command, lines in commands(block):
                done = subprocess.run(
                    ["bash", "-c", command + "\nexit $?"],  # two commands, or bash would become the first
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=400,
                )
                ran += 1
                where = f"{page.name}: {command}\n{done.stdout[-3000:]}"
                if lines == ["Killed"]:
                    assert done.returncode == 128 + 9, where
                else:
                    assert done.returncode == 0, where
                    assert not lines or prints(lines, done.stdout), where
    assert ran


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", sorted(NEEDS))
def test_a_tutorial_runs_as_it_stands(page, tmp_path):
    missing = [name for name in NEEDS[page] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    run(TUTORIALS / f"{page}.md", tmp_path)


def test_every_tutorial_is_run_and_listed():
    pages = {path.stem for path in TUTORIALS.glob("*.md")} - {"index"}
    assert pages == set(NEEDS)
    listed = re.findall(r"\]\(([\w./]+)\.md\)", (TUTORIALS / "index.md").read_text())
    assert pages == {name for name in listed if not name.startswith("..")}


def test_every_block_of_python_is_python():
    for page in TUTORIALS.glob("*.md"):
        for language, title, block in BLOCK.findall(page.read_text()):
            if language == "python":
                compile(block, f"{page.name}: {title}", "exec")


def test_what_is_printed_is_compared():
    assert prints(["...", "loss: ...% of 3"], "a\nb\nloss: 12% of 3\n")
    assert prints(["one", "...", "two", "..."], "one\ntwo\n")
    assert not prints(["...", "True"], "False\n")
    assert not prints(["True"], "noise\nTrue\n")
    assert commands("$ a\nb\n$ c\n") == [("a", ["b"]), ("c", [])]


def test_a_page_that_is_wrong_fails(tmp_path):
    (tmp_path / "page.md").write_text(
        '```python title="a.py"\nprint("yes")\n```\n\n```console\n$ python a.py\nno\n```\n'
    )
    with pytest.raises(AssertionError, match=r"python a\.py"):
        run(tmp_path / "page.md", tmp_path)


def test_files_that_are_shown_are_there():
    for page in TUTORIALS.glob("*.md"):
        for name in re.findall(r'^--8<-- "(.+)"$', page.read_text(), re.MULTILINE):
            assert (REPOSITORY / name).exists(), f"{page.name}: {name}"
