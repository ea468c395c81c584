"""The page of what works with what is the table's."""

from dataclasses import replace

from tests.suite.rules import RULES
from tests.suite.support import COLUMNS, PAGE, page
from tests.suite.table import ROWS


def cells(text: str, name: str) -> dict[str, str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return dict(zip(COLUMNS, line.strip("| ").split(" | ")[1:], strict=True))


def test_the_page_is_what_the_table_says():
    assert PAGE.read_text() == page(), "make it anew: python -m tests.suite.support"


def test_each_column_is_checked_by_its_rules_on_its_strategies():
    for checks in COLUMNS.values():
        for name, strategy in checks:
            assert strategy in (*RULES[name].strategies, *RULES[name].slow), name


def test_a_refusal_and_an_exception_are_seen():
    (row,) = [row for row in ROWS if row.id == "ZClip"]
    assert set(cells(page([row]), "ZClip").values()) == {"yes"}
    refused = replace(row, refused_strategies={"fsdp2": "no"}, refused_models={"gan": "no"})
    found = cells(page([refused]), "ZClip")
    assert {title for title, cell in found.items() if cell == "refused"} == {"FSDP2", "manual, two optimizers"}
    text = page([replace(row, exceptions={"ranks_agree-ddp": "why not", "accumulates": "it counts"})])
    found = cells(text, "ZClip")
    assert (found["DDP"], found["accumulation"], found["FSDP2"]) == ("1", "2", "yes")
    assert "1. ZClip: why not.\n2. ZClip: it counts.\n" in text
