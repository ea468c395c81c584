"""docs/support.md, from the contract's table and rules: python -m tests.suite.support

What a cell says is what the suite checks: a rule on a strategy, an exception with its reason, or a refusal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from harness import REPOSITORY
from tests.suite.probe import Probe
from tests.suite.rules import RULES
from tests.suite.table import ARC_TOPK, DDP, FSDP2, ROWS, SINGLE, Row, Strategy

PAGE = REPOSITORY / "docs" / "support.md"

Check = tuple[str, Strategy]

COLUMNS: dict[str, tuple[Check, ...]] = {
    "one device": (("resumes_exactly", SINGLE),),
    "DDP": (("ranks_agree", DDP), ("resumes_exactly", DDP)),
    "FSDP2": (("ranks_agree", FSDP2), ("resumes_exactly", FSDP2)),
    "compressed DDP": (("ranks_agree", ARC_TOPK), ("resumes_exactly", ARC_TOPK)),
    "accumulation": (("accumulates", SINGLE),),
    "bf16-mixed": (("trains_in_bfloat16", SINGLE),),
    "16-mixed": (("survives_overflow", SINGLE),),
    "manual, two optimizers": (("trains_two_optimizers_by_hand", SINGLE),),
    "torch.compile": (("trains_compiled", SINGLE),),
    "pytorch_lightning": (("does_the_same_under_pytorch_lightning", SINGLE),),
}

_HEAD = """\
# What works with what

Made by `python -m tests.suite.support` from the table by which the contract's tests run (`tests/suite/table.py`), and a
test holds this page to it. **yes**: the rules below are kept; **refused**: an error in `setup` says what to do; a
number: not kept, for the reason below. All on a CPU, distributed ones on two gloo ranks; slow ones are checked by
`make test-all`. A name with a dash is another set of arguments of the same callback. `ddp_ft` and mixtures of callbacks
are on the cards.

"""


def page(rows: Iterable[Row] = ROWS) -> str:
    """The whole page."""
    reasons: list[str] = []
    refusals: list[str] = []
    lines = [f"| | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for row in rows:
        if row.callback is not Probe:
            cells = [_cell(row, title, checks, reasons, refusals) for title, checks in COLUMNS.items()]
            lines.append(f"| {row.id} | {' | '.join(cells)} |")
    text = _HEAD + "\n".join(lines) + "\n"
    if refusals:
        text += "\nWhat is refused, in words of the error on the suite's model:\n\n"
        text += "\n".join(f"- {why}" for why in refusals) + "\n"
    if reasons:
        text += "\nWhat is not kept:\n\n" + "\n".join(f"{i}. {why}" for i, why in enumerate(reasons, 1)) + "\n"
    return text + "\nWhat each column is:\n\n" + "\n".join(_legend()) + "\n"


def _cell(row: Row, title: str, checks: Iterable[Check], reasons: list[str], refusals: list[str]) -> str:
    for name, strategy in checks:
        words = row.refused_strategies.get(strategy.name)
        if name == "trains_two_optimizers_by_hand":
            words = row.refused_models.get("gan")
        if words is not None:
            refusals.append(f"{row.id}, {title}: {words}.")
            return "refused"
        reason = row.exceptions.get(f"{name}-{strategy.name}", row.exceptions.get(name))
        if reason:
            text = f"{row.id}: {reason}."
            if text not in reasons:
                reasons.append(text)
            return str(reasons.index(text) + 1)
    return "yes"


def _legend() -> Iterator[str]:
    for title, checks in COLUMNS.items():
        said = {name: (RULES[name].check.__doc__ or "").splitlines()[0] for name, _ in checks}
        yield f"- **{title}**: " + " ".join(said.values())


if __name__ == "__main__":
    PAGE.write_text(page())
