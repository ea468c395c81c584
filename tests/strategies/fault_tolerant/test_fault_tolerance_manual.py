"""ddp_ft in manual optimization under `kill -9`: a training_step that makes several optimizer steps of its own."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

from lightning_eff.strategies.fault_tolerant.sharded_loader import ShardedLoader
from tests.strategies.fault_tolerant.replica_checks import GRADES, assert_same_run, check, killed
from tests.strategies.fault_tolerant.replica_main import Adversaries, Noisy
from tests.strategies.fault_tolerant.replica_runs import Fault, Outcome, Server, run

STEPS = 24  # runs of training_step
# Two of them make five optimizer steps: of the judge and the maker in each, of the guess in every second.
# So steps 30 and 31 are the first and the second of an even one, and 32 is what it accumulates, without a step.
PAIR: dict[str, Any] = {"kind": "adversaries", "optimizer_steps": 60, "sleep": 0.01, "workers": 1}
OF_EPOCH = 20


@pytest.fixture(scope="session")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return checked(run(server, tmp_path_factory.mktemp("manual"), steps=STEPS, **PAIR))


def checked(outcome: Outcome) -> Outcome:
    check(outcome, steps=STEPS, manual=True)
    counts: dict[int, tuple[int, int]] = {}
    for lines in outcome.steps.values():
        for line in lines:
            count = (line["ft_step"], line["optimizer_steps"])
            assert counts.setdefault(line["step"], count) == count
    assert [counts[step][1] for step in sorted(counts)] == [5 * (step // 2) + 2 * (step % 2) for step in sorted(counts)]
    return outcome


def assert_same_end(outcome: Outcome, undisturbed: Outcome) -> None:
    """The same curve, samples, weights and optimizer states as without a failure."""
    assert_same_run(checked(outcome), undisturbed, of_epoch=OF_EPOCH)
    rates = [{line["step"]: line["rate"] for line in each.steps[0]} for each in (outcome, undisturbed)]
    assert rates[0] == {step: rate for step, rate in rates[1].items() if step in rates[0]}
    ours, theirs = outcome.finals[0], undisturbed.finals[0]
    assert ours["values"] == pytest.approx(theirs["values"], rel=1e-4, abs=1e-5)
    logged = [{k: v for k, v in each["metrics"].items() if "ft/" not in k} for each in (ours, theirs)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4, abs=1e-5)
    for mine, other in zip(ours["optimizers"], theirs["optimizers"], strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


_KILLS = {
    "first part, backward": Fault(1, 30, "backward"),
    "second part, allreduce": Fault(1, 31, "allreduce"),
    "first part, forward": Fault(1, 30, "forward"),
    "first part, allreduce": Fault(1, 30, "allreduce"),
    "first part, commit": Fault(1, 30, "commit"),
    "first part, update": Fault(1, 30, "update"),
    "first part, settle": Fault(1, 30, "settle"),
    "second part, forward": Fault(1, 31, "forward"),
    "second part, backward": Fault(1, 31, "backward"),
    "second part, commit": Fault(1, 31, "commit"),
    "second part, update": Fault(1, 31, "update"),
    "second part, settle": Fault(1, 31, "settle"),
    "accumulation, backward": Fault(1, 32, "backward"),
    "accumulation, commit": Fault(1, 32, "commit"),
    "third part, allreduce": Fault(1, 34, "allreduce"),
    "third part, settle": Fault(1, 34, "settle"),
    "between steps": Fault(1, 32, "end"),
    "the writer, second part, commit": Fault(0, 31, "commit"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if i < 2 else pytest.mark.slow) for i, case in enumerate(_KILLS)]
)
def test_killed_in(case: str, server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    outcome = run(server, tmp_path, steps=STEPS, faults=(_KILLS[case],), **PAIR)
    assert_same_end(outcome, undisturbed)
    assert killed(outcome) == [_KILLS[case].replica], outcome.logs()
    assert sum(outcome.lives.values()) == 1, outcome.logs()


_SEVERAL = {
    "two at once": ((Fault(1, 31, "backward"), Fault(2, 31, "backward")), [1, 2]),
    "two in different parts": ((Fault(0, 30, "settle"), Fault(2, 31, "allreduce")), [0, 2]),
    "all but one, one after the other": ((Fault(0, 21, "allreduce"), Fault(1, 31, "backward")), [0, 1]),
    "while it heals": ((Fault(1, 21, "backward"), Fault(1, None, "healing", life=1)), [1, 1]),
    # The step in which it comes back depends on how long its start takes.
    "the one that heals it": (
        (Fault(1, 21, "backward"), *(Fault(0, step, "sending") for step in (22, 25, 27, 30, 32))),
        [0, 1],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", _SEVERAL)
def test_several_killed(case: str, server: Server, undisturbed: Outcome, tmp_path: Path) -> None:
    faults, expected = _SEVERAL[case]
    outcome = run(server, tmp_path, steps=STEPS, faults=faults, **PAIR)
    assert_same_end(outcome, undisturbed)
    assert sorted(killed(outcome)) == expected, outcome.logs()


_GLITCHES = {
    "the sum of the first part": (Fault(2, 30, "glitch in allreduce"),),
    "the sum of the second part": (Fault(2, 31, "glitch in allreduce"),),
    "what is accumulated": (Fault(2, 32, "glitch in allreduce"),),
    "the sum of the writer": (Fault(0, 31, "glitch in allreduce"),),
    "settling the first part": (Fault(2, 30, "glitch in settle"),),
    "settling the second part": (Fault(2, 31, "glitch in settle"),),
    "the meeting of a repeated part": (Fault(1, 31, "backward"), Fault(2, None, "glitch in retry")),
    "the meeting before a step": (Fault(1, 31, "backward"), Fault(2, None, "glitch in start")),
    "the sum, while another dies": (Fault(1, 31, "allreduce"), Fault(2, 31, "glitch in allreduce")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", _GLITCHES)
def test_one_replica_misses_what_the_others_got(
    case: str, server: Server, undisturbed: Outcome, tmp_path: Path
) -> None:
    outcome = run(server, tmp_path, steps=STEPS, faults=_GLITCHES[case], **PAIR)
    assert "glitch" in outcome.logs()
    assert_same_end(outcome, undisturbed)


# Without a failure: one replica alone does the work of three, which takes all of the machinery but the network.
ALONE: dict[str, Any] = {"replicas": 1, "strategy": {"max_replicas": 3, "start_grace": 0.1}}


def by_hand(steps: int, shards: int = 3, seed: int = 1) -> tuple[dict[int, float], list[Adversaries]]:
    """The same run in one process: a model for each shard, and the mean of their gradients after each backward pass."""
    loader = ShardedLoader(DataLoader(Noisy(240), batch_size=4, shuffle=True), shards, seed=seed)
    loader.own(range(shards))
    start: Any = SimpleNamespace(replica=0, life=0, process=0)
    models = [Adversaries({"equal_start": True}, start).double() for _ in range(shards)]
    made = [model.configure_optimizers() for model in models]
    losses = {}
    for step in range(steps):
        epoch, index = divmod(step, len(loader))
        loader.set_epoch(epoch)
        runs, states = [], []
        for shard, model in enumerate(models):
            x, y, _ = loader.batch(shard, index)
            runs.append(model.parts((x.double(), y.double()), index))
            torch.manual_seed(hash((seed, epoch, shard, index)) % 2**62)
            states.append(torch.get_rng_state())
        while True:
            asked = []
            for shard, run_of in enumerate(runs):
                torch.set_rng_state(states[shard])
                asked.append(next(run_of, ("end", None)))
                states[shard] = torch.get_rng_state()
            what, value = asked[0]
            if what == "end":
                break
            if what == "backward":
                for _, loss in asked:
                    loss.backward()
                average([list(model.parameters()) for model in models])
            elif what == "log" and value[0] == "loss":
                losses[step + 1] = sum(float(logged[1].detach()) for _, logged in asked) / shards
            for optimizers, schedules in made:
                if what == "zero":
                    optimizers[value].zero_grad()
                elif what == "clip":
                    nn.utils.clip_grad_norm_([p for g in optimizers[value].param_groups for p in g["params"]], 0.1)
                elif what == "step":
                    optimizers[value].step()
                elif what == "rates":
                    for schedule in schedules:
                        schedule.step()
        first = dict(models[0].named_buffers())
        for model in models[1:]:
            for name, buffer in model.named_buffers():
                buffer.copy_(first[name])
    return losses, models


def average(of_models: list[list[nn.Parameter]]) -> None:
    for parameters in zip(*of_models, strict=True):
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            mean: Tensor = torch.stack(gradients).mean(0)
            for parameter in parameters:
                parameter.grad = mean.clone()


@pytest.mark.parametrize("replicas", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_mean_over_all_shards_is_that_of_a_run_by_hand(replicas: int, server: Server, tmp_path: Path) -> None:
    losses, models = by_hand(STEPS)
    more = ALONE if replicas == 1 else {}
    settings = {**PAIR, **more, "precision": "64-true", "equal_start": True, "patience": 0.0}
    outcome = checked(run(server, tmp_path, steps=STEPS, **settings))
    assert outcome.losses() == pytest.approx(losses, rel=1e-6)  # it is logged in float32
    final = outcome.finals[0]
    expected = [float(v) for parameter in models[0].parameters() for v in parameter.detach().flatten()]
    assert final["values"] == pytest.approx(expected, rel=1e-9, abs=1e-11)
    buffers = [float(v) for buffer in models[0].buffers() for v in buffer.flatten()]
    assert final["buffers"] == pytest.approx(buffers, rel=1e-9, abs=1e-11)
    untrained = Adversaries({"equal_start": True}, models[0].faults)
    before = [float(v) for parameter in untrained.parameters() for v in parameter.detach().flatten()]
    assert final["values"] != pytest.approx(before, rel=1e-2)


@pytest.fixture(scope="session")
def automatic(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return check(
        run(server, tmp_path_factory.mktemp("automatic"), steps=STEPS, patience=0.0, **copy.deepcopy(ALONE)), STEPS
    )


@pytest.mark.parametrize("how", ["usual", "closure", "in two", "direct", "by hand"])
def test_one_optimizer_in_each_way_is_automatic_optimization(
    how: str, server: Server, automatic: Outcome, tmp_path: Path
) -> None:
    settings = {"kind": "manual", "how": how, "patience": 0.0, **copy.deepcopy(ALONE)}
    outcome = check(run(server, tmp_path, steps=STEPS, **settings), STEPS, manual=True)
    assert outcome.losses() == pytest.approx(automatic.losses(), rel=1e-5, abs=1e-6)
    assert outcome.finals[0]["values"] == pytest.approx(automatic.finals[0]["values"], rel=1e-4, abs=1e-6)
    rates = [[line["rate"] for line in each.steps[0]] for each in (outcome, automatic)]
    assert rates[0] == rates[1]


_REFUSED = {
    "past Lightning": ({"kind": "manual", "how": "past Lightning"}, "AdamW.step\\(\\) was called past Lightning"),
    "wandering": ({"kind": "wandering"}, "must not depend on the batch"),
}


@pytest.mark.parametrize(
    ("case", "replicas"),
    [("past Lightning", 1), ("wandering", 1), pytest.param("wandering", 2, marks=pytest.mark.slow)],
)
def test_refused(case: str, replicas: int, server: Server, tmp_path: Path) -> None:
    settings, message = _REFUSED[case]
    more = ALONE if replicas == 1 else {"replicas": replicas}
    outcome = run(server, tmp_path, steps=STEPS, restart=False, patience=0.0, **settings, **copy.deepcopy(more))
    assert [status for _, _, status in outcome.exits] == [1] * replicas
    for replica in range(replicas):
        assert re.search(message, (tmp_path / f"replica-{replica}-0.log").read_text()), outcome.logs()


@pytest.mark.slow
def test_user_code_that_catches_everything_is_told(server: Server, tmp_path: Path) -> None:
    settings = {"kind": "manual", "how": "caught"}
    faults = (Fault(0, 13, "glitch in allreduce"),)
    outcome = run(server, tmp_path, steps=STEPS, restart=False, faults=faults, **settings)
    assert "training_step has caught BaseException" in (tmp_path / "replica-0-0.log").read_text(), outcome.logs()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "manual", "how": "clipped"},
        {"kind": "manual", "callbacks": {"ZClip": {"warmup_steps": 5, "z_thresh": 1.0, "max_grad_norm": 0.5}}},
        {"kind": "manual", "callbacks": {"GradES": GRADES}},
        {"kind": "manual", "how": "closure", "precision": "bf16-mixed"},
    ],
    ids=["clipped by hand", "ZClip", "GradES", "a closure and bf16"],
)
def test_also_with(settings: dict[str, Any], server: Server, tmp_path: Path) -> None:
    """A replica dies as it commits, and comes back; another misses a step."""
    outcomes = []
    for name, faults in (("usual", ()), ("killed", (Fault(1, 9, "commit"), Fault(2, 16, "glitch in allreduce")))):
        (tmp_path / name).mkdir()
        outcomes.append(check(run(server, tmp_path / name, steps=STEPS, faults=faults, **settings), STEPS, manual=True))
    usual, disturbed = outcomes
    tolerance = 2e-2 if "precision" in settings else 1e-4
    assert disturbed.losses() == pytest.approx(usual.losses(), rel=tolerance, abs=tolerance)
    assert killed(disturbed) == [1]
    for name, state in usual.finals[0]["callbacks"].items():
        for mine, other in zip(disturbed.finals[0]["callbacks"][name], state, strict=True):
            near = pytest.approx(other, rel=1e-3, abs=1e-4, nan_ok=True) if isinstance(other, float) else other
            assert mine == near, name


@pytest.mark.slow
def test_shrink_leaves_the_shard_out(server: Server, tmp_path: Path) -> None:
    outcome = checked(
        run(
            server,
            tmp_path,
            steps=STEPS,
            faults=(_KILLS["second part, commit"],),
            strategy={"on_failure": "shrink"},
            **PAIR,
        )
    )
    assert killed(outcome) == [1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults", [(Fault(1, 30, "backward", process=1),), (Fault(1, 31, "commit"), Fault(0, 41, "glitch in allreduce"))]
)
def test_replicas_of_two_processes(faults: tuple[Fault, ...], server: Server, tmp_path: Path) -> None:
    """The loss curve is that of a run without a failure, and all processes have the same weights after each step."""
    outcomes = []
    for name, of_run in (("usual", ()), ("killed", faults)):
        (tmp_path / name).mkdir()
        settings = {**PAIR, "replicas": 2, "processes": 2, "samples": 256}
        outcomes.append(checked(run(server, tmp_path / name, steps=STEPS, faults=of_run, **settings)))
    usual, disturbed = outcomes
    assert killed(disturbed) == [1], disturbed.logs()
    assert disturbed.losses() == pytest.approx(usual.losses(), rel=1e-5, abs=1e-5)
    weights = {line["step"]: line["weights"] for lines in disturbed.steps.values() for line in lines}
    assert disturbed.others
    assert all(line["weights"] == weights[line["step"]] for line in disturbed.others)
