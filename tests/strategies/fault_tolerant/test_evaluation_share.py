from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, DistributedSampler

from lightning_eff.strategies.fault_tolerant.evaluation_share import EvaluationShare


def loader(count: int = 20) -> DataLoader:
    return DataLoader(range(count), batch_size=2, sampler=DistributedSampler(range(count), 1, 0, shuffle=False))


@pytest.mark.parametrize("alive", [1, 2, 3, 5])
def test_the_living_evaluate_every_sample_in_the_same_number_of_batches(alive: int) -> None:
    seen: set[int] = set()
    lengths = set()
    for rank in range(alive):
        share = EvaluationShare(loader(), lambda rank=rank: (rank, alive))
        batches = [batch.tolist() for batch in share]
        assert len(batches) == len(share)
        lengths.add(len(batches))
        seen |= {sample for batch in batches for sample in batch}
    assert seen == set(range(20))
    assert len(lengths) == 1


def test_it_follows_who_is_alive() -> None:
    place = [0, 1]
    share = EvaluationShare(loader(), lambda: (place[0], place[1]))
    assert len(share) == 10
    place[1] = 2
    assert len(list(share)) == len(share) == 5
    place[1] = 1
    assert len(list(share)) == 10


def test_a_fraction_is_of_the_replicas_batches() -> None:
    assert len(list(EvaluationShare(loader(), lambda: (0, 2), 0.4))) == 2


def test_another_sampler_gives_every_replica_all() -> None:
    assert len(list(EvaluationShare(DataLoader(range(20), batch_size=2), lambda: (1, 2)))) == 10
