"""Code on the pages runs as it stands there."""

import re

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from harness import REPOSITORY
from lightning_eff.callbacks import GradES, TrainingGuard

DOCS = REPOSITORY / "docs"


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
    for page in ("faq.md", "extending.md", "from_papers.md", "recipes.md", "fabric.md", "index.md"):
        for link in re.findall(r"\]\(([^)#]+\.md)(?:#[\w-]+)?\)", (DOCS / page).read_text()):
            assert (DOCS / page).parent.joinpath(link).exists(), f"{page}: {link}"
