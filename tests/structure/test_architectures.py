"""The finder against the table: `make test-architectures`, in an environment that has the packages."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from fnmatch import fnmatchcase
from unittest import mock

import pytest
import torch

from lightning_eff.structure import clean_named_parameters, find_blocks, select_matrices
from tests.structure.architectures import ARCHITECTURES, Architecture
from tests.structure.built_on_lightning import BUILT_ON_LIGHTNING

ROWS = (*ARCHITECTURES, *BUILT_ON_LIGHTNING)
LEAST = 0.95


def judge(architecture: Architecture) -> dict[str, tuple[object, object]]:
    """What is found and what was expected, where they differ: blocks, roles, what is selected."""
    with torch.device("meta"):
        model = architecture.build()
    blocks = find_blocks(model)
    roles = Counter(matrix.role for block in blocks for matrix in block.matrices)
    parameters = {name: p for name, p in clean_named_parameters(model).items() if p.ndim >= 2}
    selected = {name for matrix in select_matrices(model) for name in matrix.parameters}
    outside = {name for name in parameters if any(fnmatchcase(name, glob) for glob in architecture.outside)}
    expected = {"attention": architecture.attention, "ffn": architecture.ffn, "other": architecture.other}
    found = {
        "blocks": (len(blocks), architecture.blocks),
        "roles": ({role: roles[role] for role in expected}, expected),
        "selected": (sorted(selected ^ (parameters.keys() - outside)), []),
    }
    return {what: pair for what, pair in found.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("package", sorted({row.package for row in ROWS}))
@pytest.mark.filterwarnings("ignore")
def test_structure_of_other_peoples_models(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: `make test-architectures` has it")
    rows = [row for row in ROWS if row.package == package]
    with mock.patch.dict(os.environ):  # packages set variables of their own when they are imported
        wrong = {row.name: faults for row in rows if (faults := judge(row))}
    judged, failed = 3 * len(rows), sum(map(len, wrong.values()))
    assert (judged - failed) / judged >= LEAST, f"{failed} of {judged} are wrong: {wrong}"


if __name__ == "__main__":
    failed = 0
    for row in ROWS:
        try:
            faults = judge(row)
        except Exception as error:
            faults = {"error": (repr(error)[:300], None)}
        failed += len(faults)
        print(row.name, faults or "right")
    print(f"{len(ROWS)} architectures, {failed} of {3 * len(ROWS)} wrong")
