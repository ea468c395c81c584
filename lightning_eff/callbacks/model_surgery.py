"""A model's layers replaced before it is trained, from the command line as well; what was done is in the checkpoint."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_eff.arguments import check, check_count, check_instance
from lightning_eff.layers import CR, MoC, SkipV1, describe_plan, replace_layers
from lightning_eff.layers.autograd import mark
from lightning_eff.layers.replace import connections, is_replaced
from lightning_eff.training.namespaces import MisconfigurationException, is_a, overrides
from lightning_eff.training.state_version import check_version
from lightning_eff.training.trainer import callbacks_of, loaded_checkpoint

_Spec = TypeVar("_Spec", MoC, SkipV1, CR)


class ModelSurgery(Callback):
    """Replaces layers of the model by ones that keep less: Mixture-of-Channels, SkipV1Former, CR-Net.

    As :func:`lightning_eff.layers.replace_layers` does, after the module's own ``configure_model`` (its ``setup``,
    where it has none), and before weights are restored, the strategy wraps or shards the model and optimizers are made.
    A model that has been replaced already, by an earlier run of the same module, is left as it is. What was replaced,
    and what was left and why, is said at the start.

    Runs in: ``setup``; ``on_save_checkpoint``.
    Reads: the model's structure.
    Changes: the model's layers, once, before training.
    Collectives: none.
    Host syncs: none; with ``CR(recompute=True)`` one in 16 steps, to see which layers may be found again.
    Strategies: all that take a module as it is: one device, DDP and kin, FSDP2.

    Args:
        feed_forward: what becomes of feed-forward networks, a ``MoC`` or a dict of its arguments; None: nothing.
        attention: what becomes of attentions, a ``SkipV1`` or a dict; None: nothing.
        linear: what becomes of the projections of both, a ``CR`` or a dict, alone; None: nothing.
        seed: of new weights, >= 0; they are the same on all ranks, and the user's random numbers are not touched.

    Raises:
        ValueError: an argument that is not allowed, or none of the three.
        MisconfigurationException: after ``setup``, where nothing can be replaced, with the reasons.
        RuntimeError: the weights that are to be restored are of a model with other layers.

    Example:
        >>> import lightning as L
        >>> from lightning_eff.callbacks import ModelSurgery
        >>> from lightning_eff.layers import SkipV1
        >>> trainer = L.Trainer(max_steps=1, callbacks=[ModelSurgery(attention=SkipV1())], logger=False)

    Source: ours; the layers name theirs.
    """

    def __init__(
        self,
        feed_forward: MoC | None = None,
        attention: SkipV1 | None = None,
        linear: CR | None = None,
        seed: int = 0,
    ) -> None:
        feed_forward = _spec("feed_forward", feed_forward, MoC)
        attention = _spec("attention", attention, SkipV1)
        linear = _spec("linear", linear, CR)
        some = feed_forward is not None or attention is not None or linear is not None
        check("feed_forward", feed_forward, some, "a MoC, or attention a SkipV1, or linear a CR: one at least")
        both = linear is not None and (feed_forward is not None or attention is not None)
        check("linear", linear, not both, "given alone: it replaces the matrices of both others")
        check_count("seed", seed, least=0, most=2**63 - 1)
        self.feed_forward = feed_forward
        self.attention = attention
        self.linear = linear
        self.seed = seed
        self.plan: dict[str, Any] | None = None
        self._module: LightningModule | None = None
        self._restored: list[dict[str, Any]] = []
        self._wrapped: tuple[LightningModule, str, Any] | None = None
        self._hook: Any = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwrap()
        self._module = pl_module
        # Lightning calls both after this hook, and nothing of its own lies between them and the restored weights. It
        # compares the code of a method with that of its base class, which a function has and a Wrapper has not.
        name = "configure_model" if overrides(pl_module, "configure_model") else "setup"
        own = vars(pl_module).get(name)
        usual = getattr(pl_module, name)

        def then_replace(*args: Any, **kwargs: Any) -> Any:
            result = usual(*args, **kwargs)
            self._operate(pl_module)
            return result

        setattr(pl_module, name, then_replace)
        self._wrapped = (pl_module, name, own)
        self._hook = pl_module.register_load_state_dict_post_hook(self._complain)  # type: ignore[no-untyped-call]

    def _operate(self, module: LightningModule) -> None:
        if is_replaced(module):
            return
        specs = {"feed_forward": self.feed_forward, "attention": self.attention, "linear": self.linear}
        try:
            self.plan = replace_layers(module, **specs, seed=self.seed)  # type: ignore[arg-type]
        except ValueError as error:
            raise MisconfigurationException(f"ModelSurgery: {error}. Take it out, or change its arguments") from error
        rank_zero_info(f"ModelSurgery: {describe_plan(self.plan)}")

    def _complain(self, module: Any, incompatible: Any) -> None:
        """Before torch's own error, which lists the keys."""
        if self.plan is not None and (incompatible.missing_keys or incompatible.unexpected_keys):
            keys = [*incompatible.missing_keys, *incompatible.unexpected_keys]
            raise RuntimeError(
                f"the weights are of a model with other layers than those that ModelSurgery has put here ({keys[0]} and"
                f" {len(keys) - 1} more keys differ): load them without ModelSurgery and train on with"
                " replace_layers(model, ...), or give it the arguments that the run had. The plan of a run is in its"
                " checkpoint, checkpoint['callbacks']['ModelSurgery']['plan'], and replace_layers(model, plan) does it"
            )

    def _unwrap(self) -> None:
        """Leave nothing on the module but the layers."""
        if self._wrapped is not None:
            module, name, own = self._wrapped
            if own is None:
                delattr(module, name)
            else:
                setattr(module, name, own)
            self._wrapped = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for connection, state in zip(connections(pl_module), self._restored, strict=False):
            connection.load_state(state)
        self._restored = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)  # where a strategy restores callbacks after that hook
        self._unwrap()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unwrap()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwrap()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.plan is not None:  # a Trainer without this callback is told by torch's error, which names the mark
            mark(pl_module, checkpoint["state_dict"])

    @override
    def state_dict(self) -> dict[str, Any]:
        links = [] if self._module is None else [connection.state() for connection in connections(self._module)]
        return {"version": 1, "plan": self.plan, "connections": self._restored or links}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version("ModelSurgery", state_dict, known=1)
        self.plan = self.plan or state_dict["plan"]
        self._restored = list(state_dict["connections"])

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the settings, and what :meth:`state_dict` has."""
        return {
            **self.__dict__,
            "_module": None,
            "_wrapped": None,
            "_hook": None,
            "_restored": self.state_dict()["connections"],
        }


def missing_surgery(trainer: Trainer) -> str | None:
    """Why a checkpoint's weights do not fit, where its run had ModelSurgery and this Trainer has none.

    For whoever sees the error of such a load: a callback that is not there cannot.
    """
    if any(is_a(callback, ModelSurgery) for callback in callbacks_of(trainer)):
        return None
    plan = (loaded_checkpoint(trainer).get("callbacks", {}).get(ModelSurgery.__qualname__) or {}).get("plan")
    if plan is None:
        return None
    arguments = ", ".join(name for name in ("feed_forward", "attention", "linear") if plan[name] is not None)
    return (
        f"the checkpoint is of a model in which ModelSurgery replaced {len(plan['replaced'])} layers: add ModelSurgery"
        f" with that run's {arguments}, or call replace_layers(model, plan) where the model is built, with"
        " plan = checkpoint['callbacks']['ModelSurgery']['plan']"
    )


def _spec(name: str, value: Any, kind: type[_Spec]) -> _Spec | None:
    """Settings, also as a dict of plain data, as a plan and YAML have them."""
    if isinstance(value, dict):
        known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        check(
            name,
            value,
            bool(value) and set(value) <= known,
            f"a {kind.__name__}, or a dict of {', '.join(sorted(known))}",
        )
        return kind(**value)
    check_instance(name, value, kind, f"a {kind.__name__}", optional=True)
    return value  # type: ignore[no-any-return]
