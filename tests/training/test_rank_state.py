import shutil

import fsspec
import lightning as L
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

import lightning_eff.plugins
from harness.faults import InjectedError, fail_at
from harness.runs import ddp, fit, fsdp2
from lightning_eff.training.rank_state import KEY, RankState

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


class _Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class _ShardedModel(_Model):
    def configure_model(self):
        torch.distributed.fsdp.fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


class _Memory(L.Callback):
    """A tensor that says which rank it is of, and how many batches it has seen."""

    def __init__(self, name="memory", **options):
        self.tensor = torch.zeros(2)
        self.loaded = []
        self.state = RankState(name, save=lambda: {"tensor": self.tensor}, load=self.loaded.append, **options)

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            self.state.attach(trainer.strategy)

    def on_train_start(self, trainer, pl_module):
        if self.loaded and self.loaded[-1] is not None:
            self.tensor = self.loaded[-1]["tensor"].clone()

    def on_train_batch_start(self, trainer, *_):
        self.tensor += torch.tensor([1.0, 10.0 * trainer.global_rank])

    @property
    def values(self):
        return [state and state["tensor"].tolist() for state in self.loaded]


def _data():
    return DataLoader(torch.randn(40, 4), batch_size=2)


def _fit(*callbacks, model=_Model, **options):
    return fit(model(), *callbacks, data=_data(), **{"max_steps": 3, **options})


def _tree(folder):
    """Checkpoints, and the number of files beside each."""
    beside = {path.name: len(list(path.iterdir())) for path in folder.glob("*.ranks")}
    checkpoints = {path.name for path in folder.iterdir() if path.suffix != ".ranks"}
    assert {name.removesuffix(".ranks") for name in beside} <= checkpoints, "orphans"
    return {name: beside.get(f"{name}.ranks", 0) for name in checkpoints}


def test_it_is_saved_and_loaded_again(tmp_path):
    trainer = _fit(_Memory())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    memory = _Memory()
    _fit(memory, max_steps=5, ckpt_path=tmp_path / "a.ckpt")

    assert memory.values == [[3.0, 0.0]]
    assert memory.tensor.tolist() == [5.0, 0.0]
    (file,) = (tmp_path / "a.ckpt.ranks").iterdir()
    entry = torch.load(tmp_path / "a.ckpt", weights_only=True)[KEY]
    assert torch.load(file, weights_only=True)["id"] == entry["id"]
    assert file.name == f"{entry['id']}.memory.rank0.pt"


@pytest.mark.parametrize("save_last", [True, "link"])
def test_it_goes_with_the_checkpoints_that_model_checkpoint_removes(tmp_path, save_last):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, save_last=save_last)
    _fit(_Memory(), checkpoint, max_steps=4)

    kept = {"epoch=0-step=4.ckpt": 1, "last.ckpt": 1 if save_last is True else 0}
    assert _tree(tmp_path) == kept
    memory = _Memory()
    _fit(memory, checkpoint, max_steps=6, ckpt_path="last")
    assert memory.values == [[4.0, 0.0]]


def test_it_is_found_through_a_copy_and_after_a_move(tmp_path):
    _fit(_Memory()).save_checkpoint(tmp_path / "a.ckpt")
    shutil.copy(tmp_path / "a.ckpt", tmp_path / "copy.ckpt")  # what Lightning does where it cannot link
    shutil.move(tmp_path / "a.ckpt", tmp_path / "b.ckpt")

    for name in ("copy.ckpt", "b.ckpt"):
        memory = _Memory()
        _fit(memory, ckpt_path=tmp_path / name, max_steps=4)
        assert memory.values == [[3.0, 0.0]]


class _SecondReplica(SingleDeviceStrategy):
    """The one that writes dies while it saves, and this one saves in its place."""

    replicas_are_equal = True
    is_global_zero = False

    def save_checkpoint(self, *args, **kwargs):
        self.is_global_zero = True
        super().save_checkpoint(*args, **kwargs)

    def is_written(self, here):
        return here


def test_the_replica_that_saves_in_anothers_place_saves_this_too(tmp_path):
    _fit(_Memory(), strategy=_SecondReplica("cpu")).save_checkpoint(tmp_path / "a.ckpt")
    assert _tree(tmp_path) == {"a.ckpt": 1}
    memory = _Memory()
    _fit(memory, ckpt_path=tmp_path / "a.ckpt", max_steps=4)
    assert memory.values == [[3.0, 0.0]]


class _KilledError(BaseException):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_while_a_checkpoint_is_overwritten(tmp_path, when):
    """The old checkpoint keeps its own state, the new one has its own: one or the other is on disk."""
    path = tmp_path / "a.ckpt"
    memory = _Memory()
    trainer = _fit(memory)
    trainer.save_checkpoint(path)
    memory.tensor += 1
    write = trainer.strategy.checkpoint_io.save_checkpoint

    def killed(*args, **kwargs):
        if when == "after":
            write(*args, **kwargs)
        raise _KilledError

    trainer.strategy.checkpoint_io.save_checkpoint = killed
    with pytest.raises(_KilledError):
        trainer.save_checkpoint(path)
    assert _tree(tmp_path) == {"a.ckpt": 2}

    memory = _Memory()
    trainer = _fit(memory, ckpt_path=path, max_steps=4)
    assert memory.values == [[3.0, 0.0] if when == "before" else [4.0, 1.0]]
    trainer.save_checkpoint(path)
    assert _tree(tmp_path) == {"a.ckpt": 1}
    trainer.strategy.remove_checkpoint(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "cut", "of another checkpoint", "of another kind"])
def test_a_damaged_or_strange_file_is_never_taken(tmp_path, damage):
    path = tmp_path / "a.ckpt"
    trainer = _fit(_Memory())
    trainer.save_checkpoint(path)
    (file,) = (tmp_path / "a.ckpt.ranks").iterdir()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "of another checkpoint":
        trainer.save_checkpoint(tmp_path / "b.ckpt")
        shutil.copy(next((tmp_path / "b.ckpt.ranks").iterdir()), file)
    else:
        torch.save([1], file)

    memory = _Memory()
    with pytest.warns(UserWarning, match=r"\(memory\) beside .*a.ckpt is not restored .* missing or damaged"):
        _fit(memory, ckpt_path=path, max_steps=4)
    assert memory.loaded == [None]


def test_several_owners_have_files_of_their_own(tmp_path):
    path = tmp_path / "a.ckpt"
    one, two = _Memory("one"), _Memory("two")
    trainer = _fit(one, two)
    two.tensor += 1
    trainer.save_checkpoint(path)
    assert _tree(tmp_path) == {"a.ckpt": 2}

    two, three = _Memory("two"), _Memory("three")
    _fit(three, two, ckpt_path=path, max_steps=4)
    assert two.values == [[4.0, 1.0]]
    assert three.loaded == []  # it was not there
    with pytest.raises(ValueError, match="name='two' is taken"):
        _Memory("two").state.attach(two.state._files.strategy)


def test_a_checkpoint_of_weights_only_has_none(tmp_path):
    path = tmp_path / "a.ckpt"
    trainer = _fit(_Memory())
    trainer.save_checkpoint(path)
    trainer.save_checkpoint(path, weights_only=True)

    assert _tree(tmp_path) == {"a.ckpt": 0}
    assert KEY not in torch.load(path, weights_only=True)


def test_validation_leaves_the_state_alone(tmp_path):
    memory = _Memory()
    trainer = _fit(memory)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.validate(_Model(), _data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)

    assert memory.loaded == []


def test_a_damaged_file_loses_its_owner_alone(tmp_path):
    path = tmp_path / "a.ckpt"
    _fit(_Memory("one"), _Memory("two")).save_checkpoint(path)
    next((tmp_path / "a.ckpt.ranks").glob("*.one.*")).unlink()
    one, two = _Memory("one"), _Memory("two")
    with pytest.warns(UserWarning, match=r"the state \(one\) .* is not restored"):
        _fit(one, two, ckpt_path=path, max_steps=4)
    assert (one.values, two.values) == ([None], [[3.0, 0.0]])


def test_what_is_lost_may_be_made_of_other_files(tmp_path):
    path = tmp_path / "a.ckpt"
    _fit(_Memory()).save_checkpoint(path)
    shutil.rmtree(tmp_path / "a.ckpt.ranks")
    asked = []

    def recover(checkpoint, path):
        asked.append((checkpoint["global_step"], path))
        return {"tensor": torch.tensor([8.0, 9.0])}

    memory = _Memory(recover=recover)
    with pytest.warns(UserWarning, match=r"the state \(memory\) is taken from the files beside .*a.ckpt"):
        _fit(memory, ckpt_path=path, max_steps=4)
    assert memory.values == [[8.0, 9.0]]
    assert asked == [(3, str(path))]


def _as_version_0_1_wrote_it(path):
    """One file for all owners of a rank, which nobody has said to be equal on all ranks."""
    for file in path.parent.glob(f"{path.name}.ranks/*"):
        saved = torch.load(file, weights_only=True)
        state = {"id": saved["id"], "rank": saved["rank"], "states": {"memory": saved["state"]}}
        file.unlink()
        torch.save(state, file.with_name(f"{saved['id']}.rank{saved['rank']}.pt"))
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[KEY]["replicated"]
    torch.save(checkpoint, path)


@pytest.mark.parametrize("replicated", [False, True])
def test_the_files_of_version_0_1_are_read(tmp_path, replicated):
    path = tmp_path / "a.ckpt"
    _fit(_Memory()).save_checkpoint(path)
    _as_version_0_1_wrote_it(path)
    memory = _Memory(replicated=replicated)
    _fit(memory, ckpt_path=path, max_steps=4)
    assert memory.values == [[3.0, 0.0]]


def test_a_full_disk_ends_no_training(tmp_path, monkeypatch):
    import lightning_eff.training.later_files as module

    path, full, write = tmp_path / "a.ckpt", True, module._write

    def write_some(content, path, save):
        if full:
            with open("/dev/full", "wb") as file:
                torch.save(content, file)
        write(content, path, save)

    monkeypatch.setattr(module, "_write", write_some)
    trainer = _fit(_Memory())
    with pytest.warns(UserWarning, match=r"could not be written \(\[Errno 28\] No space left"):
        trainer.save_checkpoint(path)
    trainer.save_checkpoint(path)  # said once
    assert _tree(tmp_path) == {"a.ckpt": 0}
    full = False
    trainer.save_checkpoint(path)
    assert _tree(tmp_path) == {"a.ckpt": 1}


def test_what_follows_the_checkpoints_of_another_strategy(tmp_path):
    memory = _Memory()
    trainer = _fit(memory)
    assert memory.state.follows(trainer.strategy)
    assert not memory.state.follows(SingleDeviceStrategy())


def test_a_checkpoint_on_exception_has_it_and_its_removal_takes_it_away(tmp_path):
    memory, on_exception = _Memory(), OnExceptionCheckpoint(tmp_path)
    with (
        pytest.raises(InjectedError),
        pytest.warns(UserWarning, match="was called without a model|there is no last checkpoint"),
    ):
        _fit(memory, fail_at(step=2).in_hook("on_train_batch_end"), on_exception)
    assert _tree(tmp_path) == {"on_exception.ckpt": 1}

    memory = _Memory()
    with pytest.warns(UserWarning, match="was called without a model"):
        _fit(memory, on_exception)
    assert memory.values == [[2.0, 0.0]]
    assert not list(tmp_path.iterdir())


def test_it_survives_a_search_for_the_learning_rate(tmp_path):
    """Which saves a checkpoint, loads it again and removes it."""
    memory = _Memory()
    model = _Model()
    model.lr = 0.1
    finder = LearningRateFinder(num_training_steps=4)
    fit(model, memory, finder, data=_data(), max_steps=3, default_root_dir=tmp_path)

    assert memory.values == [[0.0, 0.0]]
    assert memory.tensor.tolist() == [3.0, 0.0]
    assert not list(tmp_path.iterdir())


def test_an_asynchronous_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="same", every_n_train_steps=1, enable_version_counter=False)
    _fit(_Memory(), checkpoint, plugins=[AsyncCheckpointIO()], max_steps=4)
    assert _tree(tmp_path) == {"same.ckpt": 2}  # and that before it, which was on disk for a while

    memory = _Memory()
    trainer = _fit(memory, ckpt_path=tmp_path / "same.ckpt", max_steps=5)
    assert memory.values == [[4.0, 0.0]]
    trainer.strategy.remove_checkpoint(tmp_path / "same.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_remote_folder():
    trainer = _fit(_Memory())
    trainer.save_checkpoint("memory://here/a.ckpt")
    trainer.save_checkpoint("memory://here/a.ckpt")
    fs = fsspec.filesystem("memory")
    assert len(fs.ls("/here/a.ckpt.ranks")) == 1

    memory = _Memory()
    trainer = _fit(memory, ckpt_path="memory://here/a.ckpt", max_steps=4)
    assert memory.values == [[3.0, 0.0]]
    trainer.strategy.remove_checkpoint("memory://here/a.ckpt")
    assert not fs.exists("/here/a.ckpt.ranks")


def test_detaching_leaves_the_strategy_as_it_was():
    strategy = SingleDeviceStrategy()
    mine = lambda path: None  # noqa: E731
    strategy.remove_checkpoint = mine
    before = dict(strategy.__dict__)
    one, two = _Memory("one").state, _Memory("two").state
    for state in (one, two, one):
        state.attach(strategy)
    one.detach()
    assert strategy.__dict__ != before
    two.detach()
    two.detach()

    assert strategy.__dict__ == before


def test_a_second_fit_goes_on(tmp_path):
    memory = _Memory()
    trainer = _fit(memory)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(_Model(), _data(), ckpt_path=tmp_path / "a.ckpt")

    assert memory.values == [[3.0, 0.0]]
    assert memory.tensor.tolist() == [5.0, 0.0]


def _save_on_two_ranks(folder, strategy, model):
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, save_last="link")
    _fit(_Memory(), checkpoint, strategy=strategy(), devices=2, max_steps=3, model=model)


def _resume_on_two_ranks(path, strategy, model):
    memory = _Memory()
    _fit(memory, strategy=strategy(), devices=2, max_steps=4, ckpt_path=path, model=model)
    return memory.values


def _sharded_into_one_file():
    return fsdp2(save_distributed_checkpoint=False)


@pytest.mark.parametrize(
    ("strategy", "model"), [(ddp, _Model), (fsdp2, _ShardedModel), (_sharded_into_one_file, _ShardedModel)]
)
def test_each_of_two_ranks_has_its_own(pool, tmp_path, strategy, model):
    pool.run(_save_on_two_ranks, tmp_path, strategy, model)
    assert _tree(tmp_path) == {"epoch=0-step=3.ckpt": 2, "last.ckpt": 0}

    assert pool.run(_resume_on_two_ranks, tmp_path / "last.ckpt", strategy, model) == [[[3.0, 0.0]], [[3.0, 30.0]]]


def _save_what_is_equal(folder):
    trainer = _fit(_Memory(replicated=True), strategy=ddp(), devices=2)
    trainer.save_checkpoint(folder / "a.ckpt")


def _resume_what_is_equal(path, ranks):
    memory = _Memory(replicated=True)
    _fit(memory, strategy=ddp() if ranks > 1 else "auto", devices=ranks, max_steps=4, ckpt_path=path)
    return memory.values


def test_what_is_equal_on_all_ranks_is_written_once_and_loaded_by_any_number(pool, tmp_path):
    pool.run(_save_what_is_equal, tmp_path)
    (file,) = (tmp_path / "a.ckpt.ranks").iterdir()
    assert file.name.endswith("-1.memory.pt")
    assert pool.run(_resume_what_is_equal, tmp_path / "a.ckpt", 2) == [[[3.0, 0.0]]] * 2
    assert _resume_what_is_equal(tmp_path / "a.ckpt", 1) == [[3.0, 0.0]]


def _fail_on_one_rank(folder, later):
    import warnings

    import lightning_eff.training.later_files as module

    plugins = [lightning_eff.plugins.AsyncCheckpointIO()] if later else None
    trainer = _fit(_Memory(), strategy=ddp(), devices=2, plugins=plugins)
    write = module._write

    def full(content, path, save):
        if content["rank"] == 1:
            raise OSError("disk of rank 1")
        write(content, path, save)

    module._write = full
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.save_checkpoint(folder / "a.ckpt")
            trainer.strategy.checkpoint_io.teardown()
    finally:
        module._write = write
    trainer.strategy.barrier()
    return [str(warning.message) for warning in caught if "state beside" in str(warning.message)]


@pytest.mark.parametrize("later", [False, True])
def test_a_disk_that_fails_on_another_rank_is_told_by_rank_zero(pool, tmp_path, later):
    (told,), silent = pool.run(_fail_on_one_rank, tmp_path, later)
    assert f"could not be written (on {'rank 1: OSError: disk of rank 1' if later else 'another rank'})" in told
    assert silent == []
    assert _tree(tmp_path) == {"a.ckpt": 1}


def test_another_rank_may_remove_the_folder_first(tmp_path, monkeypatch):
    memory = _Memory()
    trainer = _fit(memory)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    isdir = LocalFileSystem.isdir

    def just_before(self, path):
        found = isdir(self, path)
        if path.endswith(".ranks"):
            shutil.rmtree(path)
        return found

    monkeypatch.setattr(LocalFileSystem, "isdir", just_before)
    trainer.strategy.remove_checkpoint(tmp_path / "a.ckpt")
    assert _tree(tmp_path) == {}


@pytest.mark.filterwarnings("ignore:the state .* is not restored")
def test_all_ranks_start_anew_together(pool, tmp_path):
    pool.run(_save_on_two_ranks, tmp_path, ddp, _Model)
    path = tmp_path / "epoch=0-step=3.ckpt"
    memory = _Memory()
    with pytest.warns(UserWarning, match="was saved by 2 ranks, and there are 1 now"):
        trainer = _fit(memory, ckpt_path=path, max_steps=4)
    assert memory.loaded == [None]

    next((tmp_path / f"{path.name}.ranks").glob("*.rank1.pt")).unlink()
    assert pool.run(_resume_on_two_ranks, path, ddp, _Model) == [[None], [None]]

    trainer.save_checkpoint(path)  # over that of more ranks
    assert _tree(tmp_path)[path.name] == 1


class _RemembersByItself(SingleDeviceStrategy):
    """A strategy that owns rank-local state, as one with error feedback does."""

    def __init__(self):
        super().__init__()
        self.memory = torch.zeros(1)
        self.rank_state = RankState("strategy", save=lambda: {"memory": self.memory}, load=self._load)

    def _load(self, state):
        self.memory = state["memory"]

    def setup_environment(self):
        super().setup_environment()
        self.rank_state.attach(self)


def test_a_strategy_owns_some_of_it(tmp_path):
    trainer = _fit(_Memory(), strategy=_RemembersByItself())
    trainer.strategy.memory += 7
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    memory, strategy = _Memory(), _RemembersByItself()
    _fit(memory, strategy=strategy, ckpt_path=tmp_path / "a.ckpt", max_steps=4)

    assert strategy.memory.item() == 7
    assert memory.values == [[3.0, 0.0]]
