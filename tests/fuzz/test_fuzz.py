"""No door of the house lets nonsense in, or answers it with an error that does not name the argument."""

from __future__ import annotations

import pytest

from tests.fuzz.calls import is_of_every_step, outcomes
from tests.fuzz.known import KNOWN
from tests.fuzz.targets import given, targets

TARGETS = [
    pytest.param(each, id=each.name, marks=[pytest.mark.needs("torchft")] * (each.name == "FaultTolerantDDPStrategy"))
    for each in targets()
]


@pytest.mark.parametrize("target", TARGETS)
def test_a_right_call_works(target, tmp_path):
    """Whose required arguments are not in the table of `targets.py` is new: it needs a row there."""
    if all(is_of_every_step(annotation) for annotation in target.arguments.values()):
        pytest.skip("all of its arguments are tensors and states")
    target.call(**given(target.name, tmp_path))


@pytest.mark.parametrize("target", TARGETS)
def test_wrong_arguments_are_refused_by_name(target, tmp_path):
    wrong = {}
    for argument, annotation in target.arguments.items():
        if is_of_every_step(annotation):
            continue
        found = [
            f"{argument}={value!r} is {outcome}: {said}"
            for value, outcome, said in outcomes(target, argument, tmp_path)
            if outcome in ("unnamed", "accepted")
        ]
        if found:
            wrong[argument] = found
    known = set(KNOWN.get(target.name, "").split())
    unknown = [line for argument, lines in wrong.items() if argument not in known for line in lines]
    assert unknown == []
    assert known - set(wrong) == set(), "these are checked now: remove them from known.py"


def test_what_is_known_is_there():
    assert set(KNOWN) <= {target.name for target in targets()}
