"""Code on the pages runs as it stands there."""

import gc
import re

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from harness import REPOSITORY
from lightning_eff.callbacks import GradES, TrainingGuard

DOCS = REPOSITORY / "docs"


@pytest.fixture(autouse=True)
def _no_class_stays():
    """The command line asks Lightning's classes for all their subclasses, and those of a page cannot be imported."""
    yield
    gc.collect()


def run(page: str, without: str = "") -> dict:
    """All Python blocks of a page in one module, but those with a text in them."""
    names: dict = {"__name__": page}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        if not without or without not in block:
            exec(compile(block, f"{page}[{number}]", "exec"), names)
    return names


def test_extending():
    names = run("extending.md")
    trainer, callback = names["trainer"], next(c for c in names["trainer"].callbacks if type(c).__name__ == "Distance")
    module = BoringModel()
    trainer.fit(module)
    start = [tensor.clone() for tensor in callback.start]
    moved = sum((p - s).square().sum() for p, s in zip(module.parameters(), start, strict=True)).sqrt()
    assert trainer.callback_metrics["distance/total"].item() == pytest.approx(moved.item(), rel=1e-4)
    assert callback.heard == ["distance", "distance"]  # its own alarms, at steps 2 and 4
    again = names["Distance"]()
    again.load_state_dict(callback.state_dict())
    assert all((a == b).all() for a, b in zip(again.start, start, strict=True))
    with pytest.raises(ValueError, match="limit=0 is not allowed"):
        names["Distance"](limit=0)

    rule = names["Plateau"](patience=3)
    said = [rule.judge(step, value) for step, value in enumerate([2.0, 1.0, 1.5, 1.2, 1.1, 0.5, 0.6])]
    assert [why is not None for why in said] == [False, False, False, False, True, False, False]
    assert said[4] == "no loss below 1 for 3 steps"
    other = names["Plateau"](patience=3)
    other.load_state_dict(rule.state_dict())
    assert other.judge(7, 0.7) is None
    assert other.judge(8, 0.7) == "no loss below 0.5 for 3 steps"
    assert isinstance(names["guard"], TrainingGuard)


@pytest.mark.filterwarnings("ignore:clip_factor")
def test_from_papers():
    names = run("from_papers.md")
    assert isinstance(names["released"], GradES)
    assert names["misa"].config.eta == 1.0
    assert names["lisa"].config.units == 2


def test_recipes():
    (callbacks,) = [value.callbacks for name, value in run("recipes.md").items() if name == "trainer"]
    assert {"ZClip", "TrainingGuard", "EMA", "Preemption"} <= {type(callback).__name__ for callback in callbacks}


def test_links_between_pages_lead_somewhere():
    for page in [page.relative_to(DOCS) for page in DOCS.rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+\.md)(?:#[\w-]+)?\)", (DOCS / page).read_text()):
            assert (DOCS / page).parent.joinpath(link).exists(), f"{page}: {link}"


CARDS = sorted((DOCS / "methods").glob("*.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_every_card_has_a_picture_that_is_there(card):
    shown = re.findall(r"!\[(.+)\]\((\S+)\)", card.read_text())
    assert shown
    assert all((card.parent / path).exists() for _, path in shown)


def test_every_picture_is_shown_somewhere():
    pages = [*DOCS.rglob("*.md"), REPOSITORY / "README.md"]
    text = "".join(page.read_text() for page in pages)
    assert [picture.name for picture in (DOCS / "images").iterdir() if picture.name not in text] == []


def test_home_leads_to_every_page_of_its_own():
    home = (DOCS / "index.md").read_text()
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.glob("*.md")} - {"index.md"}
    assert pages <= set(re.findall(r"\]\(([\w/.]+\.md)\)", home))


def test_words_that_are_searched_for_are_there():
    text = " ".join("".join(page.read_text() for page in DOCS.rglob("*.md")).lower().split())
    for words in ("gradient clip", "out of memory", "slow link", "kill -9", "spikes", "time limit", "hugging face"):
        assert words in text, words
