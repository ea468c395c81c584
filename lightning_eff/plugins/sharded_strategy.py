"""A strategy of Lightning whose ranks save their shards, and which saves later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from lightning_eff.plugins.sharded_folder import folder_damage, is_sharded_folder
from lightning_eff.plugins.sharded_saves import ShardedSaves
from lightning_eff.training.namespaces import is_a
from lightning_eff.training.wrapping import Wrapper

_ABSENT = object()
_WRAPPERS = (".module.", "._orig_mod.", "._checkpoint_wrapped_module.", "_fsdp_wrapped_module.")  # in a weight's name


def saves_in_shards(strategy: Strategy) -> bool:
    """Whether checkpoints are folders that :class:`ShardedSaves` can write in a strategy's place."""
    return is_a(strategy, ModelParallelStrategy) and bool(strategy._save_distributed_checkpoint)


class SavesLater:
    """Lets a ``ModelParallelStrategy`` save by :class:`ShardedSaves`, until it is removed.

    A strategy that has ``sharded_saves`` of its own does so by these; in front of another one's methods stand others.

    Args:
        strategy: one that ``saves_in_shards``.
        saves: by which it saves.
        check_loads: look at all checksums of a folder before it is loaded, each rank at some of its files.
    """

    def __init__(self, strategy: Any, saves: ShardedSaves, check_loads: bool) -> None:
        self.strategy = strategy
        self.saves = saves
        self.check_loads = check_loads
        self._before = {name: vars(strategy).get(name, _ABSENT) for name in ("sharded_saves", "saves_later")}
        methods: dict[str, Callable[..., Any]] = {
            "lightning_module_state_dict": lambda inner: sharded_weights(strategy.model),
            "optimizer_state": lambda inner, optimizer: sharded_optimizer_state(strategy.model, optimizer),
            "save_checkpoint": self._save,
            "remove_checkpoint": lambda inner, path: saves.remove(path),
        }
        if hasattr(strategy, "sharded_saves"):
            methods = {}
        methods["load_checkpoint"] = self._load
        # Innermost: what others keep beside the checkpoints stands in front of them.
        self._wrappers = [Wrapper(strategy, *method, innermost=True) for method in methods.items()]
        strategy.sharded_saves, strategy.saves_later = saves, True

    def _save(
        self, inner: Callable[..., Any], checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if storage_options is not None:
            inner(checkpoint, path, storage_options)  # which refuses them
        self.saves.save(checkpoint, path)

    def _load(self, inner: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
        self.saves.flush()
        if self.check_loads:
            rank, ranks = self.strategy.global_rank, self.strategy.world_size
            found = folder_damage(str(path), rank, ranks) if is_sharded_folder(str(path)) else None
            if not self.strategy.reduce_boolean_decision(found is None, all=True):
                raise RuntimeError(
                    f"{path} is damaged: {found or 'another rank has found it'}; resume from another checkpoint "
                    "(`lightning-eff verify PATH ...` checks them)"
                )
        return inner(path, *args, **kwargs)

    def remove(self) -> None:
        """The strategy saves as before."""
        for wrapper in self._wrappers:
            wrapper.remove()
        for name, value in self._before.items():
            delattr(self.strategy, name) if value is _ABSENT else setattr(self.strategy, name, value)


def sharded_weights(model: Any) -> dict[str, Any]:
    """A module's state with each rank's shards where they are: the save copies them to the host, once."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state: dict[str, Any] = model.state_dict()
    # Torch's own asks for the name of each weight without its wrappers, which takes most of what a save costs.
    if any(wrapper in f".{name}" for name in state for wrapper in _WRAPPERS):
        state = get_model_state_dict(model)
    return state


def sharded_optimizer_state(model: Any, optimizer: Any) -> dict[str, Any]:
    """The same of an optimizer, or of Lightning's around it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state: dict[str, Any] = get_optimizer_state_dict(model, getattr(optimizer, "_optimizer", optimizer))
    return state
