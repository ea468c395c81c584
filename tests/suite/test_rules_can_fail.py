"""Every rule fails on a callback that breaks it, and says what is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from harness.pool import WorkerError
from tests.suite import broken
from tests.suite.probe import Probe
from tests.suite.rules import RULES
from tests.suite.runs import Place
from tests.suite.table import DDP, ROWS, SINGLE, Row

PROBE = next(row for row in ROWS if row.callback is Probe)


def _row(callback: Any = Probe, **changes: Any) -> Row:
    return dataclasses.replace(PROBE, callback=callback, **changes)


CASES = [
    ("resumes_exactly", _row(broken.SavesNothing), "net, rank 0, crash after step 3"),
    ("resumes_exactly", _row(broken.LoadsHalf, arguments={"slope": 0.1, "form": "square"}), "crash after step 3"),
    ("data_and_randomness_resume_exactly", _row(broken.SavesNothing), "broken off after step 5: .*parameters"),
    ("data_and_randomness_resume_exactly", _row(broken.DrawsFromItsOwn), "broken off after step 5: .*parameters"),
    ("saves_only_what_loads_safely", _row(broken.SavesADefaultdict), r"state\['seen'\]: defaultdict"),
    ("state_survives_a_round_trip", _row(broken.LoadsHalf), r"state.norms\[0\]"),
    ("state_carries_a_version", _row(broken.KnowsNoVersion), r"state\['version'\] is None"),
    ("state_carries_a_version", _row(broken.LoadsAnyVersion), "a state of a newer version was loaded"),
    ("accumulates", _row(broken.ActsOnMicroBatches), "parameters"),
    ("ranks_agree", _row(broken.DecidesByRank), "rank 0 against rank 1"),
    ("ranks_agree", _row(broken.SumsOverRanks), "one device against two ranks"),
    ("trains_in_bfloat16", _row(broken.LeavesBfloat16), "is torch.bfloat16"),
    ("survives_overflow", _row(broken.CountsDroppedSteps), "left a trace"),
    ("trains_compiled", _row(broken.SkipsCompiledModules), "parameters"),
    ("trains_two_optimizers_by_hand", _row(broken.KnowsOneOptimizer), "moved"),
    ("ignores_the_sanity_check", _row(broken.CountsValidations), "callback.validations"),
    ("evaluates_on_two_loaders", _row(broken.LogsWhatALoaderHasLogged), "fit does not run: .*dataloader_idx_0"),
    ("takes_data_without_a_length", _row(broken.NeedsALength), "parameters"),
    ("reads_no_memory_that_it_did_not_write", _row(broken.ReadsUnwrittenMemory), "parameters"),
    ("fits_twice", _row(broken.WorksOnce), "the second fit changed nothing"),
    ("leaves_the_learning_rate_finder_alone", _row(broken.TakesALoadForAResume), "parameters"),
    ("waits_for_nothing", _row(broken.WaitsEveryStep), "1 host syncs in a step"),
    ("waits_for_nothing", _row(broken.WaitsWhenItLogs), "in 2 steps that are logged; 2 are allowed"),
    ("draws_no_random_numbers", _row(broken.DrawsFromTorch), "torch"),
    ("draws_no_random_numbers", _row(broken.DrawsFromRandom), "random"),
    ("a_rollback_draws_other_numbers", _row(broken.SeedsEachStep), r"steps \[7, 8\] draw what they drew before"),
    ("a_snapshot_waits_for_nothing", _row(broken.WaitsForItsState), "1 host syncs when the state is taken"),
    ("a_snapshot_waits_for_nothing", _row(broken.CopiesItsState), "2 tensors are copies"),
    ("monitors_without_touching", _row(changes_training=False), "parameters|blocks"),
    ("monitors_without_touching", _row(broken.Idle, arguments={}), "nothing changed"),
    ("an_exception_leaves_nothing_behind", _row(broken.LeavesAHook), "on_train_batch_start: .*_forward_hooks"),
    ("an_exception_leaves_nothing_behind", _row(broken.LeavesAnOptimizerHook), "_optimizer_step_post_hooks"),
    ("an_exception_leaves_nothing_behind", _row(broken.SwapsWeights), "not those that were trained"),
    ("can_be_pickled", _row(broken.ForgetsItsArguments), "trains differently"),
    ("can_be_pickled", _row(broken.ForgetsItsState), "pickled after a fit"),
    ("needs_no_logger", _row(broken.WritesAFile), "probe.txt"),
    ("logs_to_tensorboard", _row(broken.LogsNothing), r"\['probe/norm'\] missing"),
    ("logs_to_tensorboard", _row(broken.LogsMore), r"\['probe/more'\] are logged and not in the row"),
    ("logs_to_any_logger", _row(broken.LogsNothing), r"\['probe/norm'\] missing"),
    ("does_the_same_under_pytorch_lightning", _row(broken.KnowsOneName), "rank 0: .*parameters"),
    ("refuses_bad_arguments", _row(bad_arguments=({"slope": 3.0},)), "slope=3.0 was accepted"),
    ("refuses_bad_arguments", _row(broken.HidesTheValue), "does not give the value"),
    ("refuses_conflicts", _row(conflicts=(({"accumulate_grad_batches": 2}, "?"),)), "was accepted"),
    ("refuses_conflicts", _row(conflicts=(({"gradient_clip_val": 1.0}, "a mend"),)), "does not say 'a mend'"),
    ("refuses_conflicts", _row(refused_models={"gan": "manual"}), "'gan'} was accepted"),
    ("refuses_strategies", _row(refused_strategies={"single": "?"}), "single was accepted"),
    ("says_what_it_touches", _row(broken.SaysLittle), r"there are \['Runs in:'\]"),
    ("has_typed_arguments", _row(broken.HasUntypedArguments), "slope has no type"),
    ("has_typed_arguments", _row(broken.HasNoPlainDefault), "YAML cannot hold"),
    ("works_from_the_command_line", _row(broken.IsUnknownToTheParser), "refuses"),
]


@pytest.mark.parametrize(
    ("rule", "row", "words"), CASES, ids=[f"{rule}-{row.callback.__name__}" for rule, row, _ in CASES]
)
def test_rule_fails(rule, row, words, tmp_path, pool):
    strategy = SINGLE if SINGLE in RULES[rule].strategies else DDP
    with pytest.raises((AssertionError, WorkerError), match=words):
        RULES[rule].check(row, Place(strategy, tmp_path, pool))


def test_every_rule_is_seen_to_fail():
    assert RULES.keys() == {rule for rule, *_ in CASES}
