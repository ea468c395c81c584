"""GradES in the Trainer: what it watches, what freezing saves, and what else must stay as it was."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import re
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from harness.operators import OperatorCounter
from harness.recorders import Reduced
from harness.runs import ddp
from lightning_eff.callbacks import GradES
from lightning_eff.strategies import ArcTopK, CompressedDDPStrategy
from lightning_eff.training.optimizer_state import state_bytes
from tests.callbacks.grades.grades_models import NAMINGS, STEPS, TOKENS, WIDTH, Model, Told, fit
from tests.suite.runs import SaveAt, assert_equal, weights

Q = ("attn.q.weight",)  # in both blocks


class Each(L.Callback):
    """Calls a function at the end of every step."""

    def __init__(self, call):
        self.call = call

    def on_train_batch_end(self, trainer, module, *_):
        self.call(trainer, module)


# --- what is watched -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("compiled", [None, "blocks"])
def test_the_matrices_of_the_blocks_are_found_under_any_names(naming, compiled):
    seen = []
    callback = GradES(heat_map=False)
    fit(callback, Each(lambda *_: seen.append(callback._fit.watch.units.names)), model=Model(naming), max_steps=1)
    path, _, names = NAMINGS[naming]
    assert seen == [[f"{path}.{block}.{name}.weight" for block in range(2) for name in names]]


def test_a_low_rank_pair_is_one_unit():
    seen = []
    callback = GradES(heat_map=False)
    fit(callback, Each(lambda *_: seen.append(callback._fit.watch.units.matrices)), model=Model(lora=True), max_steps=1)
    units = {matrix.name: matrix.parameters for matrix in seen[0]}
    pair = "transformer.h.1.attn.q"
    assert len(units) == 4
    assert units[f"{pair}.base.weight"] == (f"{pair}.lora_A.weight", f"{pair}.lora_B.weight")


@pytest.mark.parametrize(
    ("arguments", "model", "words"),
    [
        (
            {"include": ["*nothing*"]},
            {},
            r"include='\*nothing\*' matches no matrix. There are: .*transformer.wte.weight",
        ),
        ({"exclude": ["*"]}, {}, "exclude leaves nothing. Candidates"),
        (
            {"exclude": ["*lora*"], "include": ["*head*"]},
            {"lora": True},
            "^GradES: no selected matrix is trained.*head.weight",
        ),
        ({"prefix": ["*wpe*"]}, {}, r"prefix='\*wpe\*' matches no parameter.*transformer.wte.weight"),
        ({"prefix": ["*wte*"]}, {"tied": True}, "tied to 'head.weight'"),
    ],
)
def test_patterns_that_cannot_work_are_refused(arguments, model, words):
    with pytest.raises(MisconfigurationException, match=words):
        fit(GradES(**arguments, heat_map=False), model=Model(**model))


def test_conflicts_are_refused():
    other = L.Callback()
    other.changes_trainable = True
    with pytest.raises(MisconfigurationException, match="GradES and Callback would both decide which"):
        fit(GradES(), other)
    with pytest.raises(MisconfigurationException, match="GradES and BackboneFinetuning would both decide which"):
        fit(GradES(), BackboneFinetuning())
    static = SimpleNamespace(strategy=DDPStrategy(static_graph=True), callbacks=[])
    with pytest.raises(MisconfigurationException, match="remove static_graph"):
        GradES().setup(static, None, "fit")
    with pytest.raises(MisconfigurationException, match="alpha=0 and max_events=None"):
        fit(GradES(alpha=0.0), max_steps=-1, max_epochs=-1)
    fit(GradES(alpha=0.0, max_events=None, heat_map=False), Each(lambda t, _: setattr(t, "should_stop", True)),
        max_steps=-1, max_epochs=-1)  # fmt: skip


# --- what freezing does --------------------------------------------------------------------------------------------


class DropsGradients(L.Callback):
    """The same by other means: the optimizer never sees the gradients of what is frozen."""

    def __init__(self, since, key):
        self.since, self.key = since, key

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step >= self.since:
            for name, parameter in module.named_parameters():
                if self.key in name:
                    parameter.grad = None


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_everything_else_trains_on_as_if_only_the_updates_were_missing(options, optimizer):
    told = Told([(4, Q[0])])
    _, module = fit(told, model=Model(optimizer=optimizer), **options)
    # Decided by the gradient of step 4, read and done when step 5 has been made.
    assert told.frozen == {f"transformer.h.{block}.{Q[0]}": 5 for block in range(2)}
    _, other = fit(DropsGradients(5, Q[0]), model=Model(optimizer=optimizer), **options)
    assert_equal(weights(module), weights(other))
    assert all(parameter.requires_grad for parameter in module.parameters())  # unfrozen after the fit


def test_the_weight_gradient_is_really_left_out_and_the_one_behind_is_not():
    seen = []

    def look(trainer, module):
        gradients = {name for name, p in module.named_parameters() if p.grad is not None}
        seen.append((len(gradients), "transformer.wte.weight" in gradients))

    model = Model()
    fit(Told([(4, "h.1")]), Each(look), model=model)
    every = len(list(model.parameters()))
    assert [count for count, _ in seen] == [every] * 4 + [every - 6] * (STEPS - 4)
    assert all(embedding for _, embedding in seen)


def test_a_real_run_freezes_by_its_own_metric_and_never_at_first_sight():
    # The authors' code freezes all at its first check in this setting and stops.
    rule = dict(metric="grad_change", tau=1e9, tau_mode="absolute")
    callback = GradES(**rule, alpha=0.0, every_n_steps=2, patience=1, max_events=None)
    trainer, _ = fit(callback)
    assert (
        trainer.global_step == 7
    )  # at step 2 there is nothing to compare with, 4 is the first sight; read a step later
    assert set(callback.frozen.values()) == {7}
    assert len(callback.frozen) == 12


def test_the_grace_period_is_a_fraction_of_the_run():
    for limit in ({"max_steps": 20}, {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 10}):
        callback = GradES(tau=1e9, tau_mode="absolute", alpha=0.5, every_n_steps=1, patience=1, max_events=None)
        trainer, _ = fit(callback, **limit)
        assert trainer.global_step == 12, limit  # step 11 is the first behind half of 20; done at the end of 12


def test_the_optimizers_state_is_freed_and_its_groups_stay():
    held, freed = [], []
    for release, sizes in ((False, held), (True, freed)):
        look = Each(
            lambda t, m, sizes=sizes: sizes.append(
                (state_bytes(t.optimizers), len(t.optimizers[0].param_groups[0]["params"]))
            )
        )
        fit(Told([(4, Q[0])], release_state=release), look, model=Model(optimizer="adamw"))
    per_matrix = 2 * 4 * WIDTH * WIDTH + 4  # two moments and a count of steps
    assert held[-1][0] - freed[-1][0] == 2 * per_matrix
    assert held[3] == freed[3]
    assert {groups for _, groups in held + freed} == {len(list(Model().parameters()))}


@pytest.mark.parametrize("metric", ["grad_change", "grad", "weight_change"])
def test_copies_are_freed_with_what_is_frozen(metric):
    sizes = []
    told = Told([(4, Q[0])], metric=metric)
    fit(told, Each(lambda *_: sizes.append(len(told._fit.watch._metric.copies))))
    assert sizes == ([0] * STEPS if metric == "grad" else [12] * 4 + [10] * (STEPS - 4))


class Sparse(Model):
    def __init__(self):
        super().__init__()
        self.get_submodule(self.embedding_at).sparse = True


def test_sparse_gradients_are_refused_before_the_first_step():
    with pytest.raises(MisconfigurationException, match=r"GradES .*transformer\.wte\.weight has sparse ones"):
        fit(GradES(include=["*wte*"]), model=Sparse())


class Complex(Model):
    """A block's input goes through a complex matrix, too."""

    def __init__(self):
        super().__init__()
        self.mixing = torch.nn.Parameter(torch.eye(WIDTH, dtype=torch.complex64) + 0.1j)
        self.get_submodule(self.embedding_at).register_forward_hook(
            lambda m, _, out: (out + 0j).matmul(self.mixing).real
        )


@pytest.mark.parametrize("metric", ["grad_change", "grad", "weight_change"])
def test_complex_weights_are_measured_as_pairs_of_reals(metric):
    metrics, moved = [], []

    def look(trainer, module):
        moved.append((module.mixing if metric == "weight_change" else module.mixing.grad).detach().clone())
        metrics.append(grades._fit.watch._state["metric"].item())

    grades = GradES(tau=1e-9, include=["mixing"], metric=metric, alpha=0.0, every_n_steps=1, max_events=None)
    fit(grades, Each(look), model=Complex())
    pairs = [torch.view_as_real(value).double() for value in moved]
    if metric == "grad":
        assert metrics == pytest.approx([pair.abs().sum().item() for pair in pairs], rel=1e-5)
        return
    changes = [(new - old).abs().sum().item() for old, new in itertools.pairwise(pairs)]
    # Weights are measured before the step: what is seen at the end of step n is measured in step n + 1.
    first = 1 if metric == "grad_change" else 2
    assert metrics[first:] == pytest.approx(changes[: len(metrics) - first], rel=1e-5)


class Pruned(ModelPruning):
    """Renames ``weight`` to ``weight_orig`` at the end of the first epoch."""

    def __init__(self):
        super().__init__(
            "l1_unstructured", amount=0.25, parameter_names=["weight"], apply_pruning=lambda epoch: not epoch
        )

    def filter_parameters_to_prune(self, parameters_to_prune=()):
        return [(module, name) for module, name in parameters_to_prune if isinstance(module, torch.nn.Linear)]


def test_a_parameter_that_is_renamed_in_mid_run_is_followed():
    trained = []
    names = ("transformer.h.0.attn.q", "transformer.h.1.attn.q")

    def look(trainer, module):
        weights = [getattr(module.get_submodule(name), "weight_orig", None) for name in names]
        trained.append([None if weight is None else weight.requires_grad for weight in weights])

    told = Told([(8, Q[0])])
    fit(Pruned(), told, Each(look), max_steps=-1, max_epochs=3, limit_train_batches=5)
    assert trained == [[None] * 2] * 5 + [[True] * 2] * 3 + [[False] * 2] * 7
    assert set(told.frozen.values()) == {9}


# --- the end -------------------------------------------------------------------------------------------------------


def test_training_stops_when_all_are_frozen(caplog):
    with caplog.at_level(logging.INFO):
        trainer, _ = fit(Told([(4, "")]))
    assert trainer.global_step == 5
    assert "GradES: 12 of 12 matrices are frozen: training stops at step 5" in caplog.text
    trainer, _ = fit(Told([(4, "")], stop_when_frozen=False))
    assert trainer.global_step == STEPS


@pytest.mark.parametrize(
    "arguments", [{"tau": 1e-4}, {"tau": 1e-4, "tau_mode": "relative"}, {"tau": 1e-9, "tau_mode": "absolute"}]
)
def test_it_says_why_nothing_was_frozen(caplog, arguments):
    with caplog.at_level(logging.INFO):
        grades = GradES(alpha=0.3, every_n_steps=1, patience=1, **arguments)
        fit(grades)
    assert not grades.frozen
    (said,) = re.findall(r"GradES froze nothing of 12 matrices: (\S+), the most settled, was at ([\d.]+)", caplog.text)
    assert said[0].endswith("weight")
    assert float(said[1]) > arguments["tau"]


def test_training_stops_when_nothing_is_left_to_train(caplog):
    with caplog.at_level(logging.INFO):
        trainer, _ = fit(Told([(4, "")], stop_when_frozen=False), model=Model(lora=True))
    assert trainer.global_step == 5
    assert "nothing else is trained" in caplog.text


@pytest.mark.parametrize("limit", [{"min_steps": 9}, {"max_epochs": 4, "min_epochs": 3}])
def test_what_is_reported_as_frozen_is_frozen_until_the_trainer_may_stop(limit, caplog):
    seen = {}
    look = Each(lambda t, m: seen.update({t.global_step: weights(m)}))
    with caplog.at_level(logging.INFO):
        trainer, _ = fit(Told([(4, "")]), look, limit_train_batches=3, **limit)
    assert "12 of 12 matrices are frozen: training stops when it has come to min_steps and min_epochs" in caplog.text
    assert trainer.global_step == 9
    moved = {name for name in seen[5] if not torch.equal(seen[5][name], seen[9][name])}
    assert "transformer.wte.weight" in moved
    assert not any(".attn." in name or ".mlp." in name for name in moved)


def test_something_is_trained_until_the_trainer_may_stop():
    trained = []
    told = Told([(4, "")])
    look = Each(lambda t, m: trained.append(sum(p.requires_grad for p in m.parameters())))
    trainer, _ = fit(told, look, model=Model(lora=True), min_steps=9, limit_train_batches=3)
    assert trained == [8] * 4 + [2] * 4 + [2]  # four pairs, then the least settled of them
    assert trainer.global_step == 9
    assert len(told.frozen) == 4


EVERY = dict(tau=1e9, tau_mode="absolute", every_n_steps=1)
WHY_NONE = {
    "short": (dict(every_n_steps=2), 4, "none was checked more than 2 times, and the first 10 tell"),
    "short, relative": (
        dict(tau_mode="relative", every_n_steps=2),
        4,
        "none was checked more than 2 times, and the first 5 tell",
    ),
    "impatient": ({**EVERY, "patience": 9}, 6, "only for 5 in a row, and patience=9"),
    "undue": ({**EVERY, "stop_when_frozen": False}, 8, "had settled, but the run ended before"),
    "moving": (
        dict(every_n_steps=1),
        16,
        "has to be below 0.5 of it, the rest of the run good for less than tau=0.02 of",
    ),
    "moving, relative": (
        dict(tau=1e-9, tau_mode="relative", every_n_steps=1),
        12,
        "has to be below tau=1e-09 for patience=3 checks in a row",
    ),
}


@pytest.mark.parametrize("name", WHY_NONE)
def test_why_nothing_was_frozen_is_no_contradiction(name, caplog):
    arguments, steps, words = WHY_NONE[name]
    with caplog.at_level(logging.INFO):
        stop = Each(lambda trainer, _: setattr(trainer, "should_stop", trainer.global_step == steps))
        fit(GradES(alpha=0.0, metric="grad", **arguments), stop, max_steps=100 if name == "undue" else steps)
    (said,) = [record.message for record in caplog.records if "froze nothing of 12" in record.message]
    assert words in said


def test_no_more_than_the_ratio_is_frozen_and_the_most_settled_first():
    told = Told([(3, "h.0"), (3, "h.1")], max_frozen_ratio=0.25, stop_when_frozen=False)
    fit(told)
    assert len(told.frozen) == 3
    told = Told([(3, "h.0"), (3, "h.1")], max_frozen_ratio=0.25)
    assert fit(told)[0].global_step == 4


def test_events_are_batched_into_evenly_spaced_times():
    names = [
        f"{block}.{name}" for block in (0, 1) for name in ("attn.q", "attn.k", "attn.v", "attn.c", "mlp.c_f", "mlp.c_p")
    ]
    told = Told(list(zip(range(2, 13), names[:11], strict=True)), max_events=3)
    fit(told, max_steps=16)
    events = sorted(set(told.frozen.values()))
    assert events == [4, 8, 12]
    assert len(told.frozen) == 10  # what settled after the last time is not frozen


# --- the prefix ----------------------------------------------------------------------------------------------------


def test_the_backward_pass_ends_behind_a_frozen_prefix():
    seen = {}

    def look(trainer, module):
        gradients = [name for name, p in module.named_parameters() if p.grad is not None]
        seen[trainer.global_step] = (len(gradients), [name for name in gradients if "h.1" not in name])

    # The last matrices of block 0 settle at step 5; block 1 keeps being trained.
    told = Told([(3, "h.0.attn"), (5, "h.0.mlp")], prefix=["*wte*"])
    fit(told, Each(look))
    assert "transformer.wte.weight" in seen[5][1]
    assert seen[6][1] == ["final_norm.weight", "final_norm.bias", "head.weight"]
    assert seen[STEPS] == seen[6]

    flops = []
    told = Told([(3, "h.0")], prefix=["*wte*"])
    fit(told, Each(lambda *_: flops.append(told._fit.flops)))
    head = WIDTH * TOKENS
    blocks = 2 * (4 * WIDTH * WIDTH + 2 * 2 * WIDTH * WIDTH)
    assert flops[0] == (4 * (blocks + head),) * 2
    assert flops[-1] == (4 * (blocks + head), 4 * (blocks // 2 + head))


# --- unfreezing ----------------------------------------------------------------------------------------------------


class RisingLoss(Model):
    """The loss is multiplied by ten from a step on."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (10.0 if batch_idx >= 8 else 1.0)


class ReturnsNothing(Model):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_a_matrix_is_unfrozen_when_the_loss_rises():
    frozen = []
    told = Told([(3, Q[0])], unfreeze="loss", unfreeze_factor=2.0, stop_when_frozen=False)
    fit(told, Each(lambda *_: frozen.append(len(told._fit.watch.frozen))), model=RisingLoss(), max_steps=11)
    assert frozen == [0, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0]  # rises at step 9, is read a step later
    with pytest.raises(MisconfigurationException, match="needs training_step to return the loss"):
        fit(Told([], unfreeze="loss"), model=ReturnsNothing())


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
@pytest.mark.parametrize("manual", [False, True])
def test_a_batch_that_is_skipped_says_nothing_of_the_loss(manual):
    class Skips(ReturnsNothing):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            if manual:
                super().training_step(batch, batch_idx)
            return None if batch_idx == 4 else Model.training_step(self, batch, batch_idx)

    told = Told([], unfreeze="loss")
    fit(told, model=Skips(), max_steps=7)
    assert told.state_dict()["step"] == 7


def test_a_matrix_is_unfrozen_when_its_neighbours_move():
    class Rising(Told):
        def on_before_optimizer_step(self, trainer, *arguments):
            self.schedule = [(3, Q[0])] if trainer.global_step < 8 else []
            super().on_before_optimizer_step(trainer, *arguments)

    frozen = []
    told = Rising([], unfreeze="neighbours", unfreeze_factor=1.5, stop_when_frozen=False)
    fit(told, Each(lambda *_: frozen.append(sorted(told._fit.watch.frozen.values()))))
    assert frozen[5] == [4, 4]  # steady neighbours keep it frozen
    assert frozen[-1] == [4, 4]


# --- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 4, 5, 9])
@pytest.mark.parametrize("release", [False, True])
def test_a_run_resumes_exactly_before_between_and_after_events(at, release, tmp_path):
    def arguments():
        return Told([(4, "h.0.attn"), (7, "h.1.mlp")], release_state=release, heat_map=True)

    whole, straight = arguments(), Model(optimizer="adamw")
    trainer, _ = fit(whole, model=straight)
    path = tmp_path / "saved.ckpt"
    fit(arguments(), SaveAt(at, path), model=Model(optimizer="adamw"), enable_checkpointing=True)
    resumed, module = arguments(), Model(optimizer="adamw")
    again, _ = fit(resumed, model=module, resume=path)
    assert_equal(weights(straight), weights(module))
    assert resumed.frozen == whole.frozen
    assert {5, 8} == set(whole.frozen.values())
    for one, other in zip(trainer.optimizers, again.optimizers, strict=True):
        states = (one.state_dict()["state"], other.state_dict()["state"])
        assert states[0].keys() == states[1].keys()
        for number, state in states[0].items():
            assert all(torch.equal(state[name], states[1][number][name]) for name in state)
    assert torch.equal(whole.state_dict()["watch"]["values"], resumed.state_dict()["watch"]["values"])


def test_a_run_that_had_frozen_all_does_not_go_on(tmp_path):
    path = tmp_path / "saved.ckpt"
    fit(Told([(4, "")]), SaveAt(5, path), enable_checkpointing=True)
    trainer, _ = fit(Told([(4, "")]), resume=path)
    assert trainer.global_step == 5
    # Unless it is told to: then all matrices are frozen, and the rest is trained.
    trainer, module = fit(Told([(4, "")], stop_when_frozen=False), resume=path)
    assert trainer.global_step == STEPS
    saved = torch.load(path, weights_only=True)["state_dict"]
    moved = {name for name, weight in weights(module).items() if not torch.equal(weight, saved[name])}
    assert "transformer.wte.weight" in moved
    assert not any(".attn." in name or ".mlp." in name for name in moved)


def test_units_that_are_new_or_gone_after_a_resume(tmp_path):
    path = tmp_path / "saved.ckpt"
    fit(Told([(4, Q[0])]), SaveAt(6, path), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="6 saved matrices no longer, such as 'transformer.h.0.attn.q.weight'"):
        fit(told := Told([], exclude=["*h.0*"]), resume=path)
    assert told.frozen == {f"transformer.h.1.{Q[0]}": 5}


class RollsBack(L.Callback):
    """As a guard does it: back to an earlier step in the middle of the fit."""

    def __init__(self, told, save, back):
        self.told, self.save, self.back = told, save, back
        self.state = None

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.save and self.state is None:
            self.state = copy.deepcopy(self.told.run_state())
        if trainer.global_step == self.back:
            self.told.load_run_state(trainer, module, self.state, within_step=False)
            self.open = {name for name, p in module.named_parameters() if p.requires_grad}
            trainer.should_stop = True


@pytest.mark.parametrize(("save", "closed"), [(3, set()), (6, {f"transformer.h.{b}.{Q[0]}" for b in range(2)})])
def test_a_rollback_unfreezes_what_was_frozen_later(save, closed):
    told = Told([(4, Q[0]), (7, "mlp")])
    guard = RollsBack(told, save, 9)
    _, module = fit(told, guard)
    assert {name for name, _ in module.named_parameters()} - guard.open == closed
    assert set(told.frozen) == closed


# --- two ranks -----------------------------------------------------------------------------------------------------


def _under_ddp(find_unused):
    counter, told = Reduced(), Told([(4, Q[0]), (7, "mlp")])
    _, module = fit(counter, told, strategy=ddp(find_unused_parameters=find_unused), devices=2)
    return weights(module), counter.bytes, told.frozen


@pytest.mark.parametrize("find_unused", [False, True])
def test_frozen_matrices_are_no_longer_reduced(pool, find_unused):
    one, two = pool.run(_under_ddp, find_unused)
    assert_equal(one[0], two[0])
    assert one[1:] == two[1:]
    every = 4 * sum(p.numel() for p in Model().parameters())
    attention, mlp = 4 * 2 * WIDTH * WIDTH, 4 * 2 * 2 * 2 * WIDTH * WIDTH
    assert one[1] == [every] * 5 + [every - attention] * 3 + [every - attention - mlp] * (STEPS - 8)
    assert set(one[2].values()) == {5, 8}


def _compressed():
    compressor = ArcTopK(ratio=0.25, rank=1, min_numel=16, error_feedback="ef14")
    strategy = CompressedDDPStrategy(compressor=compressor, process_group_backend="gloo")
    seen = []

    def look(trainer, module):
        seen.append((strategy.traffic.steps, set(strategy.memory), strategy.traffic.bytes_sent))

    _, module = fit(Told([(4, "mlp.c_fc"), (7, "attn")]), Each(look), strategy=strategy, devices=2)
    return weights(module), seen


def test_the_suites_compression_forgets_what_is_frozen_and_sends_less(pool):
    one, two = pool.run(_compressed)
    assert_equal(one[0], two[0])
    memories = [memory for _, memory, _ in one[1]]
    frozen = {f"transformer.h.{block}.mlp.c_fc.weight" for block in range(2)}
    assert frozen <= memories[3]
    assert memories[4] == memories[3] - frozen
    assert memories[7] == {name for name in memories[4] if "attn" not in name}
    assert {f"transformer.h.{block}.mlp.c_proj.weight" for block in range(2)} <= memories[-1]
    sent = [after - before for (_, _, before), (_, _, after) in itertools.pairwise(one[1])]
    assert sent[2] > sent[5] > sent[-1]


# --- what it costs -------------------------------------------------------------------------------------------------


def test_the_host_reads_once_a_check_after_the_grace_period_and_never_in_it():
    counts = {}
    for alpha in (0.5, 0.9):
        for name, callbacks in (("with", [GradES(tau=1e-9, alpha=alpha, every_n_steps=2)]), ("without", [])):
            with OperatorCounter() as counter:
                fit(*callbacks, max_steps=20)
            counts[alpha, name] = counter.host_syncs
    # Of the ten checks, those at 12, 14, 16 and 18 lie behind half of the run and are read a step later; once more
    # for the forecast, and once at the end, to say why nothing was frozen.
    assert counts[0.5, "with"] - counts[0.5, "without"] == 4 + 1 + 1
    assert counts[0.9, "with"] - counts[0.9, "without"] == 0 + 1 + 1


class CountsGraphs:
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.mark.parametrize("what", ["model", "blocks"])
def test_recompilations_are_bounded_by_the_events(what):
    import torch._dynamo

    torch._dynamo.reset()
    backend = CountsGraphs()
    model = Model()
    if what == "model":
        model.forward = torch.compile(model.forward, backend=backend)
    else:
        for block in model.transformer.h:
            block.compile(backend=backend)
    steps = [
        (step, f"{b}.{m}")
        for step, (b, m) in enumerate([(b, m) for m in ("attn.q", "attn.k", "attn.v", "mlp.c_f") for b in (0, 1)], 3)
    ]
    told = Told(steps, max_events=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        fit(told, model=model, max_steps=16)
    torch._dynamo.reset()
    events = len(set(told.frozen.values()))
    assert events == 3
    assert len(told.frozen) == 8
    first = 1 if what == "model" else 2
    assert backend.graphs <= first * (1 + events), backend.graphs
    _, plain = fit(Told(steps, max_events=3), max_steps=16)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(model)[name], weight)


# --- what it shows -------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_numbers_the_events_and_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    told = Told([(4, Q[0])], heat_map=True, log_details=True)
    fit(told, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir).Reload()
    values = {tag: [event.value for event in events.Scalars(f"grades/{tag}")] for tag in
              ("frozen_ratio", "frozen_params", "frozen_attention", "frozen_ffn", "backward_flops_saved")}  # fmt: skip
    late = STEPS - 4
    assert values["frozen_ratio"] == pytest.approx([0.0] * 4 + [2 / 12] * late)
    assert values["frozen_params"] == [0.0] * 4 + [2 * WIDTH * WIDTH] * late
    assert values["frozen_attention"] == [0.0] * 4 + [2.0] * late
    assert values["frozen_ffn"] == [0.0] * STEPS
    total = 4 * (2 * 8 * WIDTH * WIDTH + WIDTH * TOKENS)
    assert values["backward_flops_saved"] == pytest.approx([0.0] * 4 + [2 * 2 * WIDTH * WIDTH / total] * late)
    name = f"transformer.h.1.{Q[0]}"
    sums = [event.value for event in events.Scalars(f"grades/metric/{name}")]
    each = [event.value for event in events.Scalars(f"grades/metric_per_element/{name}")]
    assert math.isnan(sums[0])  # of one gradient there is no change yet
    assert math.isnan(each[0])
    assert each[1:] == pytest.approx([value / WIDTH**2 for value in sums[1:]])
    (text,) = events.Tensors("grades/events/text_summary")
    words = text.tensor_proto.string_val[0].decode()
    assert words.startswith("GradES, step 5: froze 2; 2 of 12 matrices are frozen")
    assert name in words
    assert [image.step for image in events.Images("grades/heat_map")] == [STEPS]


@pytest.mark.needs("matplotlib")
def test_the_learning_rate_finder_within_a_fit_leaves_nothing_frozen(tmp_path):
    from lightning.pytorch.callbacks import LearningRateFinder

    class Tuned(Model):
        def __init__(self):
            super().__init__()
            self.lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    open_ = []
    told = Told([(2, Q[0])], heat_map=True)
    look = Each(lambda t, m: open_.append(sum(p.requires_grad for p in m.parameters())))
    finder = LearningRateFinder(num_training_steps=5, update_attr=True, early_stop_threshold=None)
    fit(finder, told, look, model=Tuned(), enable_checkpointing=True, max_steps=6,
        default_root_dir=tmp_path, logger=CSVLogger(tmp_path))  # fmt: skip
    assert [path.name for path in tmp_path.rglob("*.png")] == ["grades_heat_map.png"]
    every = len(list(Model().parameters()))
    assert open_[-6:] == [every] * 3 + [every - 2] * 3
