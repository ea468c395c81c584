"""Which copy of Lightning an object is of."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys

import pytest
import pytorch_lightning as pl
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException as Usual
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from harness import REPOSITORY
from harness.processes import environment
from lightning_eff.training.namespaces import MisconfigurationException, both, is_a, overrides


@pytest.mark.parametrize("kind", [DDPStrategy, ModelCheckpoint, LightningModule, TorchCheckpointIO])
def test_the_twin_is_another_class_of_the_same_name(kind: type) -> None:
    usual, other = both(kind)
    assert usual is kind
    assert other is not kind
    assert other.__name__ == kind.__name__
    assert other.__module__.split(".")[0] in ("pytorch_lightning", "lightning_fabric")


def test_a_subclass_of_the_twin_counts() -> None:
    class Own(pl.strategies.DDPStrategy):
        pass

    assert is_a(Own(), DDPStrategy)
    assert is_a(Own(), SingleDeviceStrategy, DDPStrategy)
    assert not is_a(Own(), SingleDeviceStrategy)
    assert not is_a(pl.callbacks.Timer(), ModelCheckpoint)
    assert both(int) == (int,)


def test_overrides_knows_both_names() -> None:
    for package_module in (LightningModule, pl.LightningModule):

        class Own(package_module):
            def configure_model(self) -> None:
                pass

        assert overrides(Own(), "configure_model")
        assert not overrides(Own(), "on_save_checkpoint")
    for callback in (Callback, pl.Callback):
        assert not overrides(callback(), "state_dict")


def test_a_refusal_is_caught_under_either_name() -> None:
    for kind in (Usual, pl.utilities.exceptions.MisconfigurationException):
        with pytest.raises(kind, match="a mend"):
            raise MisconfigurationException("a mend")
    again = pickle.loads(pickle.dumps(MisconfigurationException("a mend")))  # from a rank to the launcher
    assert type(again) is type(MisconfigurationException("a mend"))
    assert str(again) == "a mend"


def test_nothing_is_imported_for_it() -> None:
    script = (
        "import sys\n"
        "from lightning.pytorch.strategies import DDPStrategy\n"
        "from lightning_eff.training.namespaces import MisconfigurationException, both\n"
        "assert both(DDPStrategy) == (DDPStrategy,)\n"
        "assert type(MisconfigurationException('a')) is MisconfigurationException\n"
        "assert 'pytorch_lightning' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment(), cwd=REPOSITORY)


def _asked_by_isinstance(text: str) -> list[str]:
    """Classes of Lightning that a file hands to ``isinstance``."""
    tree = ast.parse(text)
    of_lightning = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning"
        for alias in node.names
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    asked = [node.args[1] for node in calls if node.func.id in ("isinstance", "issubclass")]  # type: ignore[attr-defined]
    return [
        name.id for kinds in asked for name in ast.walk(kinds) if isinstance(name, ast.Name) and name.id in of_lightning
    ]


def test_no_callback_or_strategy_asks_one_name_alone() -> None:
    """A check by ``isinstance`` would be wrong for a user of the other name: ``is_a`` is for that."""
    rooms = ("callbacks", "strategies", "plugins", "training")
    files = [path for room in rooms for path in (REPOSITORY / "lightning_eff" / room).rglob("*.py")]
    assert len(files) > 80
    found = {str(path.relative_to(REPOSITORY)): _asked_by_isinstance(path.read_text()) for path in files}
    assert {path: names for path, names in found.items() if names} == {}
    wrong = "from lightning.pytorch.strategies import A\nfrom torch import Tensor\nisinstance(x, A | B | Tensor)"
    assert _asked_by_isinstance(wrong) == ["A"]
