"""The steps of a sharded module see whole weights, and whoever else meets a shard is told so."""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_eff.training.namespaces import both

STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")
_TOGGLES = ("toggle_optimizer", "untoggle_optimizer")

_ATTRIBUTE = "_lightning_eff_whole_weights"
_ENTER = "_lightning_eff_enter"
_MIXED = "mixed torch.Tensor and DTensor"  # in the message of torch's error


class ShardedWeightsError(RuntimeError):
    """A method of a module has met a weight of which this rank holds a part only."""


class WholeWeights:
    """Lets FSDP gather a module's own weights for as long as one of its methods runs.

    What lies in no block of its own is gathered: embeddings, heads, norms, parameters of the module itself. The blocks
    gather theirs when they are called. A method that another one calls is within it, `forward` too: FSDP's own hook on
    the module is taken away, which would take an input that needs a gradient for the end of the backward pass.

    Stays on the module, as the sharding does.

    Args:
        module: sharded by ``fully_shard``, blocks and itself.
        methods: that read weights, beside the steps.
    """

    def __init__(self, module: LightningModule, methods: Iterable[str]) -> None:
        self.module = module
        self.inside = False
        self.before_step: Callable[[], None] = lambda: None
        """Of the strategy."""
        state = fully_shard.state(module)  # type: ignore[attr-defined]
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        # Without arguments: what goes in is what FSDP would look at.
        setattr(module, _ENTER, lambda call: call())
        register_fsdp_forward_method(module, _ENTER)
        own = _own_methods(type(module))
        entered = own.intersection(STEPS).union(methods)
        for name in entered:
            setattr(module, name, self._entering(name, getattr(module, name)))
        for name in own - entered:
            setattr(module, name, _explaining(name, getattr(module, name)))
        for name in _TOGGLES:
            setattr(module, name, self._refreshing(getattr(module, name)))
        setattr(module, _ATTRIBUTE, self)

    @staticmethod
    def of(module: LightningModule) -> WholeWeights | None:
        """Of a module that is sharded already."""
        return getattr(module, _ATTRIBUTE, None)

    def backward_reduces(self, loss: Tensor) -> None:
        """A backward pass within a step: FSDP knows only what a method returns."""
        if self.inside:
            self._enter(lambda: loss)

    def refresh(self) -> None:
        """Gather anew within a step: a backward pass has given the weights back, or the shards have changed."""
        if self.inside:
            self._reshard()
            self._enter(lambda: None)

    def _enter(self, call: Callable[[], Any]) -> Any:
        return getattr(self.module, _ENTER)(call)

    def _reshard(self) -> None:
        assert isinstance(self.module, FSDPModule)
        self.module.reshard()

    def _entering(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        explained = _explaining(name, method)

        @functools.wraps(method)  # and no further: Lightning looks at the signature behind one wrapper
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return explained(*args, **kwargs)
            self.inside = True
            try:
                if name in STEPS:
                    self.before_step()
                return self._enter(functools.partial(explained, *args, **kwargs))
            finally:
                self.inside = False
                if name == "training_step" and not self.module.automatic_optimization:
                    self._reshard()  # as after a step whose backward pass comes later

        return call

    def _refreshing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """FSDP hands on ``requires_grad`` when it gathers."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self.refresh()
            return result

        return call


def _explaining(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except ShardedWeightsError:
            raise
        except Exception as error:
            if not _of_shards(error):
                raise
            mend = (
                "it reads the weight of a block outside of the block's forward pass: leave that block whole with "
                "FSDP2Strategy(exclude=[...])"
                if name in STEPS
                else f"it is none of the steps: name it in FSDP2Strategy(forward_methods=[{name!r}])"
            )
            raise ShardedWeightsError(f"{name} meets a weight of which each rank holds a part; {mend}") from error

    return call


def _of_shards(error: Exception) -> bool:
    """Whether it comes from an operator of DTensors: of torch's own making, or of what it has run into."""
    frames = traceback.walk_tb(error.__traceback__)
    within = any(frame.f_globals.get("__name__", "").startswith("torch.distributed.tensor.") for frame, _ in frames)
    return within or _MIXED in str(error)


def _own_methods(cls: type) -> set[str]:
    """What the user's classes define, down to LightningModule.

    A loss or a metric that a class holds can be called too, and is no method: nothing binds it.
    """
    bases = both(LightningModule)
    classes = itertools.takewhile(lambda each: each not in bases, cls.__mro__)
    return {
        name
        for each in classes
        if not issubclass(each, FSDPModule)
        for name, value in vars(each).items()
        if callable(value)
        and hasattr(type(value), "__get__")
        and not isinstance(value, staticmethod)
        and not name.startswith("__")
    }
