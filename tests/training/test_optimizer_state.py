import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.distributed.optim import ZeroRedundancyOptimizer

from harness.runs import ddp, fit, fsdp2
from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.optimizer_state import (
    allow_absent_states,
    check_release_support,
    release_state,
    state_bytes,
)
from lightning_eff.training.trainable import set_trainable
from tests.suite.models import Indices
from tests.suite.runs import SaveAt, differences, full

STEPS = 6
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "loop": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


# --- counting and releasing ----------------------------------------------------------------------------------------


def _stepped(build, weights):
    optimizer = build(weights)
    _step(optimizer, weights)
    return optimizer


def _step(optimizer, weights):
    for number, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, 0.1 * (number + 1))
    optimizer.step()


def _weights():
    return [torch.nn.Parameter(torch.linspace(-1, 1, 4).reshape(2, 2)) for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "size"), [("adamw", 36), ("fused", 36), ("loop", 52), ("momentum", 16), ("sgd", 0), ("rmsprop", 20)]
)
def test_bytes_are_those_of_the_tensors(name, size):
    weights = _weights()
    optimizer = _stepped(OPTIMIZERS[name], weights)

    assert state_bytes([optimizer]) == 2 * size
    assert state_bytes([optimizer], weights[:1]) == size
    assert release_state([optimizer], weights[:1]) == size
    assert state_bytes([optimizer]) == size
    assert state_bytes([optimizer], weights[:1]) == 0
    assert weights[0] not in optimizer.state  # asking has not made an empty one


def test_several_optimizers_and_nested_states():
    one, two = _weights()
    optimizers = [_stepped(OPTIMIZERS["momentum"], [one]), _stepped(OPTIMIZERS["adamw"], [two])]
    optimizers[0].state[one]["history"] = [torch.zeros(3), {"last": torch.zeros(2, dtype=torch.float64)}]

    assert state_bytes(optimizers) == 16 + 12 + 16 + 36
    assert release_state(optimizers, [one, two]) == 80


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_released_parameter_is_stepped_as_one_that_is_new(name):
    weights = _weights()
    optimizer = _stepped(OPTIMIZERS[name], weights)
    release_state([optimizer], weights[:1])
    fresh = torch.nn.Parameter(weights[0].detach().clone())
    other = OPTIMIZERS[name]([fresh])
    for _ in range(2):
        _step(optimizer, weights)
        _step(other, [fresh])

    assert torch.equal(weights[0], fresh)
    assert not differences(optimizer.state[weights[0]], other.state[fresh])


def test_optimizers_that_cannot_do_with_it_are_refused():
    check_release_support([build(_weights()) for build in OPTIMIZERS.values()])
    adagrad = torch.optim.Adagrad(_weights())
    check_release_support([adagrad], again=False)
    with pytest.raises(MisconfigurationException, match="Adagrad makes its state when it is built"):
        check_release_support([adagrad])
    with pytest.raises(MisconfigurationException, match="LBFGS keeps one state for all"):
        check_release_support([torch.optim.LBFGS(_weights())])


def _refuse_zero():
    optimizer = ZeroRedundancyOptimizer(_weights(), torch.optim.AdamW)
    with pytest.raises(MisconfigurationException, match="ZeroRedundancyOptimizer divides the state over the ranks"):
        check_release_support([optimizer])


def test_an_optimizer_that_divides_its_state_is_refused(pool):
    pool.run(_refuse_zero)


# --- resume with states absent -------------------------------------------------------------------------------------


class _Model(L.LightningModule):
    def __init__(self, optimizer, sharded):
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        self.kind, self.sharded = optimizer, sharded
        self.automatic_optimization = optimizer != "two"

    def configure_model(self):
        if self.sharded:
            for module in (*self.layers, self.layers):
                torch.distributed.fsdp.fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def train_dataloader(self):
        return Indices(20)

    def training_step(self, batch, batch_idx):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.trainer.global_step))
        loss = self.layers(inputs).square().mean()
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return None

    def configure_optimizers(self):
        # Groups in another order than the model's.
        groups = [{"params": [p for p in self.parameters() if p.ndim == n], "lr": 0.01 / n} for n in (2, 1)]
        if self.kind == "two":
            return [OPTIMIZERS["adamw"](groups[:1]), OPTIMIZERS["momentum"](groups[1:])], []
        return OPTIMIZERS[self.kind](groups)


class _Releases(L.Callback):
    """Trains some layers alone at a time; the set changes at the end of given steps."""

    def __init__(self, plan):
        self.plan = plan  # step -> layers that are trained from then on
        self.closed = []

    def setup(self, trainer, pl_module, stage):
        allow_absent_states(trainer.strategy)
        allow_absent_states(trainer.strategy)

    def on_train_start(self, trainer, pl_module):
        if self.closed:
            set_trainable(trainer, dict.fromkeys(self.closed, False))

    def on_train_batch_end(self, trainer, pl_module, *_):
        step = trainer.global_step // len(trainer.optimizers)
        if step in self.plan:
            names = {name: int(name.split(".")[1]) in self.plan[step] for name in clean_named_parameters(pl_module)}
            change = set_trainable(trainer, names)
            release_state(trainer.optimizers, change.frozen.values())
            self.closed = [name for name, trained in names.items() if not trained]

    def state_dict(self):
        return {"closed": self.closed}

    def load_state_dict(self, state_dict):
        self.closed = state_dict["closed"]


def _strategy(name):
    if name == "single":
        return "auto", 1
    if name == "ddp":
        return ddp(find_unused_parameters=True), 2
    return fsdp2(save_distributed_checkpoint=name == "fsdp2-sharded"), 2


def _fit(kind, strategy, plan, steps, around=(), resume=None):
    built, devices = _strategy(strategy)
    module = _Model(kind, strategy.startswith("fsdp2"))
    steps *= 2 if kind == "two" else 1
    options = {"strategy": built, "devices": devices, "max_steps": steps}
    trainer = fit(module, _Releases(plan), *around, ckpt_path=resume, **options)
    optimizers = [
        {
            # PyTorch gives a pair of betas back as a list.
            "groups": [
                {key: list(value) if isinstance(value, tuple) else value for key, value in group.items()}
                for group in optimizer.state_dict()["param_groups"]
            ],
            "state": {
                name: full(dict(optimizer.state[parameter]))
                for name, parameter in clean_named_parameters(module).items()
                if parameter in optimizer.state
            },
        }
        for optimizer in trainer.optimizers
    ]
    return {"parameters": full(dict(module.named_parameters())), "optimizers": optimizers}


def _resume(kind, strategy, plan, saved, folder):
    path = folder / "saved.ckpt"
    unbroken = _fit(kind, strategy, plan, STEPS)
    at_the_crash = _fit(kind, strategy, plan, saved)
    per_step = 2 if kind == "two" else 1
    broken = _fit(kind, strategy, plan, saved, around=[SaveAt(saved * per_step, path)])
    here = _fit(kind, strategy, plan, saved, resume=path)  # no step: what was loaded
    resumed = _fit(kind, strategy, plan, STEPS, resume=path)
    return (
        differences(at_the_crash, broken, "saving"),
        differences(at_the_crash, here, "loading"),
        differences(unbroken, resumed, "going on"),
        [sorted(o["state"]) for o in here["optimizers"]],
    )


_PLAN = {1: (0, 1), 3: (1, 2), 5: (0, 2)}
_FIRST_TWO = [f"layers.{layer}.{kind}" for layer in (0, 1) for kind in ("bias", "weight")]
_MIDDLE = _FIRST_TWO[2:]  # trained before and after step 3; the third layer has no state yet


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        *(("single", kind) for kind in ("adamw", "fused", "momentum", "two")),
        ("ddp", "adamw"),
        *(("fsdp2-sharded", kind) for kind in ("adamw", "two")),
        *(("fsdp2-full", kind) for kind in ("momentum", "two")),
    ],
)
@pytest.mark.parametrize(
    ("saved", "plan", "present"),
    [(2, _PLAN, _FIRST_TWO), (3, _PLAN, _MIDDLE), (3, {1: (0,), 3: (1,)}, [])],
    ids=["inside", "at-the-change", "without-any"],
)
def test_resume_is_exact_with_states_absent(pool, tmp_path, kind, strategy, saved, plan, present):
    if strategy == "single":
        ranks = [_resume(kind, strategy, plan, saved, tmp_path)]
    else:
        ranks = pool.run(_resume, kind, strategy, plan, saved, tmp_path)

    for saving, loading, going_on, names in ranks:
        assert saving == []
        assert loading == []
        assert going_on == []
        assert sorted(name for optimizer in names for name in optimizer) == present
