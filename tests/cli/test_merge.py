import math
import os
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule
from safetensors.torch import load_file

from harness.runs import fit, quiet_trainer
from lightning_eff.callbacks import EMA
from lightning_eff.cli import main
from lightning_eff.merging.safe_files import save_safetensors
from tests.merging.plain import save_plain


class Net(L.LightningModule):
    """A tied weight, float buffers, an integer buffer, hyperparameters, and a loss that knows the best weight."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = torch.nn.Linear(width, width, bias=False)
        self.norm = torch.nn.BatchNorm1d(width)
        self.head = torch.nn.Linear(width, width, bias=False)
        self.head.weight = self.embed.weight

    def training_step(self, batch, batch_idx):
        return self.head(self.norm(self.embed(batch))).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.embed.weight - 1.5).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Data(BoringDataModule):
    """Random numbers."""


@pytest.fixture
def merge(monkeypatch, tmp_path, capsys):
    """Run `lightning-eff merge` in an empty directory: its exit status, stdout and stderr."""

    def merge(*args):
        status = main(["merge", *map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return merge


def train(steps, folder, every, *callbacks):
    """Keep a checkpoint in `folder` after every so many steps."""
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)
    data = torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=4)
    fit(Net(), *callbacks, checkpoint, data=data, max_steps=steps, limit_val_batches=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of a real run after steps 2, 4, 6, 8 and 10; a shell lists step 10 first."""
    folder = tmp_path_factory.mktemp("run")
    L.seed_everything(0, verbose=False)
    train(10, folder, 2)
    paths = sorted(folder.glob("*.ckpt"))
    assert paths[0].name == "step=10.ckpt"
    return paths


def states(paths):
    """State dicts by step."""
    loaded = [torch.load(path, weights_only=True) for path in paths]
    return [one["state_dict"] for one in sorted(loaded, key=lambda one: one["global_step"])]


# --- what is merged -------------------------------------------------------------------------------------------------


def test_a_run_is_merged_into_a_checkpoint_that_lightning_loads(merge, run):
    status, out, _ = merge(*run, "-o", "merged.ckpt", "--scheme", "wsm")
    assert status == 0, out
    assert [line.split()[-2:] for line in out.splitlines() if "step=" in line] == [
        ["2", "0.4472"],
        ["4", "0.1852"],
        ["6", "0.1421"],
        ["8", "0.1198"],
        ["10", "0.1056"],
    ]
    model = Net.load_from_checkpoint("merged.ckpt")
    assert model.hparams.width == 32
    assert model.head.weight is model.embed.weight
    weights = [1 - math.sqrt(i / 5) for i in range(5)] + [0.0]
    weights = [a - b for a, b in zip([1.0, *weights[1:5]], [*weights[1:5], 0.0], strict=True)]
    for name, merged in model.state_dict().items():
        each = [state[name] for state in states(run)]
        if name == "norm.num_batches_tracked":
            assert merged.item() == 10
        else:
            expected = sum(weight * one.double() for weight, one in zip(weights, each, strict=True))
            torch.testing.assert_close(merged, expected.float(), rtol=1e-6, atol=1e-7)


def test_the_merged_checkpoint_has_weights_and_hyperparameters_and_no_training_state(merge, run):
    assert merge(*run, "-o", "merged.ckpt")[0] == 0
    checkpoint = torch.load("merged.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == {"width": 32}
    assert checkpoint["global_step"] == 10
    assert not {"optimizer_states", "lr_schedulers", "callbacks", "loops"} & set(checkpoint)
    assert checkpoint["lightning_eff_merge"] == {
        "files": [f"step={step}.ckpt" for step in (2, 4, 6, 8, 10)],
        "weights": [0.2] * 5,
        "scheme": "uniform",
    }
    state = checkpoint["state_dict"]
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()  # one tensor, once in the file
    quiet_trainer(accelerator="cpu").validate(Net(), Data(), ckpt_path="merged.ckpt", verbose=False)


def test_every_scheme(merge, run):
    for options in [
        ["uniform"],
        ["linear"],
        ["exponential", "--alpha", "0.3"],
        ["wsm", "--decay", "cosine"],
        ["loss", "--losses", "1", "5", "4", "3", "2", "--penalty", "2"],
        ["step", "--penalty", "6.9"],
        ["posthoc", "--stored-sigma-rels", "0.1", "0.05", "0.1", "0.05", "0.1", "--sigma-rel", "0.07"],
    ]:
        status, out, err = merge(*run, "-o", "merged.safetensors", "--overwrite", "--scheme", *options)
        assert (status, err) == (0, ""), out
        weights = [float(line.split()[-1]) for line in out.splitlines() if "step=" in line]
        assert sum(weights) == pytest.approx(1, abs=3e-4)
    # The losses were given in the order of the files: the file of step 10 first.
    merge(*run, "-o", "merged.ckpt", "--scheme", "loss", "--losses", "1", "5", "5", "5", "5", "--penalty", "100")
    torch.testing.assert_close(
        torch.load("merged.ckpt", weights_only=True)["state_dict"]["embed.weight"], states(run)[-1]["embed.weight"]
    )


def test_given_weights_in_the_given_order(merge, tmp_path):
    assert merge(*save_plain(tmp_path), "-o", "m.safetensors", "--weights", "2", "-1.5", "0.5")[0] == 0
    merged = load_file("m.safetensors")
    assert merged["w"].tolist() == [-0.5] * 4
    assert merged["n"].item() == 2


def test_kinds_of_files_mix(merge, run):
    """A Lightning checkpoint, a safetensors file, a sharded folder: the same tensors, the same result."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    first, second, third = states(run)[:3]
    save_safetensors("second.safetensors", second, {"global_step": "4"})
    with pytest.warns(UserWarning, match="disabled|unavailable"):
        dcp.save({"state_dict": third}, checkpoint_id="third", no_dist=True)
    torch.save({"global_step": 6, "hyper_parameters": {"width": 32}}, "third/meta.pt")
    first = next(path for path in run if path.name == "step=2.ckpt")
    files = ["third", "second.safetensors", first]
    assert merge(*files, "-o", "mixed.ckpt", "--scheme", "linear")[0] == 0
    same = [path for path in run if path.name in ("step=2.ckpt", "step=4.ckpt", "step=6.ckpt")]
    assert merge(*same, "-o", "same.ckpt", "--scheme", "linear")[0] == 0
    mixed, same = (Net.load_from_checkpoint(name).state_dict() for name in ("mixed.ckpt", "same.ckpt"))
    for name, tensor in same.items():
        assert torch.equal(mixed[name], tensor), name


def _save_shards(folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for i in range(2):
        whole = torch.arange(30.0).reshape(10, 3) * (i + 1)
        rows, columns = (distribute_tensor(whole, mesh, [Shard(dim)]) for dim in (0, 1))
        state = {"rows": rows, "columns": columns, "n": torch.tensor(i)}
        dcp.save({"state_dict": state, "optimizer_0": {"moment": rows}}, checkpoint_id=Path(folder) / str(i))


def test_shards_of_two_ranks_are_put_together(merge, pool, tmp_path):
    pool.run(_save_shards, str(tmp_path))
    assert merge("0", "1", "-o", "merged.safetensors", "--weights", "0.25", "0.75")[0] == 0
    merged = load_file("merged.safetensors")
    expected = torch.arange(30.0).reshape(10, 3) * 1.75
    assert merged.keys() == {"rows", "columns", "n"}
    assert torch.equal(merged["rows"], expected)
    assert torch.equal(merged["columns"], expected)
    assert merged["n"].item() == 1


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_averages_of_the_ema_callback_give_another_width(merge, tmp_path, suffix):
    ema = EMA(widths=[0.05, 0.10, 0.07], validate_with="current", save="all")
    train(60, "run", 10, ema)
    # The first width has the plain name.
    stored = [f"run/{name}-step={step}.{suffix}" for name in ("ema", "ema-0.1") for step in range(10, 61, 10)]
    status, out, err = merge(*stored, "-o", "merged.ckpt", "--scheme", "posthoc", "--sigma-rel", "0.07")
    assert status == 0, err
    assert "with a relative error of 0.0" in out
    made = torch.load("merged.ckpt", weights_only=True)["state_dict"]["embed.weight"]
    kept = torch.load("run/ema-0.07-step=60.ckpt", weights_only=True)["state_dict"]["embed.weight"]
    live = torch.load("run/step=60.ckpt", weights_only=True)["state_dict"]["embed.weight"]
    assert (made - kept).norm() < 0.05 * (live - kept).norm()


def test_a_nan_is_told(merge, tmp_path):
    fine = torch.full((100,), 60000.0, dtype=torch.float16)  # its sum is no float16
    torch.save({"w": torch.tensor([1.0, math.nan]), "v": fine, "c": torch.ones(1, dtype=torch.complex64)}, "a.pt")
    status, _, err = merge("a.pt", "-o", "m.ckpt")
    assert status == 0
    assert err == "Note: there are NaN or infinite values in w\n"


def test_buffers_are_copied_by_choice_and_the_dtype_is_set_by_choice(merge, run):
    options = ["--copy", "*.running_*", "--dtype", "float64"]
    assert merge(*run, "-o", "merged.safetensors", *options)[0] == 0
    merged = load_file("merged.safetensors")
    assert torch.equal(merged["norm.running_mean"], states(run)[-1]["norm.running_mean"])
    exact = torch.stack([state["norm.bias"].double() for state in states(run)]).mean(0)
    assert merged["norm.bias"].dtype == torch.float64
    torch.testing.assert_close(merged["norm.bias"], exact, rtol=0, atol=1e-15)


def test_overwriting_an_input_is_possible(merge, tmp_path):
    paths = save_plain(tmp_path)
    os.rename(paths[0], "a.ckpt")
    assert merge("a.ckpt", *paths[1:], "-o", "a.ckpt", "--overwrite")[0] == 0
    assert torch.load("a.ckpt", weights_only=True)["state_dict"]["w"].tolist() == [1.0] * 4


def test_a_pipe_gets_no_progress_bar(merge, tmp_path):
    assert merge(*save_plain(tmp_path), "-o", "m.ckpt")[2] == ""


# --- what is refused, with nothing left behind -----------------------------------------------------------------------


def plain(folder, **tensors):
    torch.save(tensors, folder / "other.pt")


def truncated(folder, name, data=b""):
    path = folder / name
    data = data or path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    return path


def truncated_torch(folder):
    plain(folder, w=torch.ones(4), n=torch.tensor(1))
    truncated(folder, "other.pt")


def truncated_safetensors(folder):
    save_safetensors(folder / "other.safetensors", {"w": torch.ones(4), "n": torch.tensor(1)}, {})
    truncated(folder, "other.safetensors")


def with_objects(folder):
    torch.save({"state_dict": {"w": torch.ones(4)}, "hyper_parameters": {"path": Path("x")}}, folder / "other.pt")


def folder_without_metadata(folder):
    (folder / "other").mkdir()


@pytest.mark.parametrize(
    ("prepare", "other", "message"),
    [
        (lambda f: plain(f, w=torch.ones(4)), "other.pt", "hold different tensors; only in 1.pt: n"),
        (lambda f: plain(f, w=torch.ones(4), n=torch.tensor(1), x=torch.ones(1)), "other.pt", "only in other.pt: x"),
        (lambda f: plain(f, w=torch.ones(5), n=torch.tensor(1)), "other.pt", r"differ in shape: w: float32 (5,) and"),
        (lambda f: plain(f, w=torch.ones(4).bfloat16(), n=torch.tensor(1)), "other.pt", "--dtype"),
        (lambda f: None, "other.pt", "other.pt: no such file or folder"),
        (truncated_torch, "other.pt", "other.pt: it is truncated"),
        (truncated_safetensors, "other.safetensors", "other.safetensors: it is truncated"),
        (lambda f: (f / "other.pt").write_bytes(b""), "other.pt", "other.pt: it is"),
        (lambda f: (f / "other.safetensors").write_bytes(b"hello world"), "other.safetensors", "no safetensors file"),
        (with_objects, "other.pt", "holds Python objects"),
        (folder_without_metadata, "other", "no sharded checkpoint: it has no .metadata"),
        (lambda f: plain(f, w=torch.ones(4).to_sparse(), n=torch.tensor(1)), "other.pt", "'w' is a sparse"),
        (lambda f: torch.save([1], f / "other.pt"), "other.pt", "it holds a list, and no dict"),
        (lambda f: torch.save({"epoch": 1}, f / "other.pt"), "other.pt", "no state_dict"),
    ],
)
def test_inputs_that_do_not_fit(merge, tmp_path, prepare, other, message):
    save_plain(tmp_path, 2)
    prepare(tmp_path)
    before = sorted(tmp_path.iterdir())
    status, _, err = merge("0.pt", other, "1.pt", "-o", "merged.ckpt")
    assert status == 1
    assert message in err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_truncated_shard(merge, tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    with pytest.warns(UserWarning, match="disabled|unavailable"):
        dcp.save({"w": torch.ones(1000)}, checkpoint_id="a", no_dist=True)
    file = next(Path("a").glob("*.distcp"))
    data = file.read_bytes()
    file.write_bytes(bytes(len(data)))
    assert "a: w cannot be read" in merge("a", "-o", "merged.ckpt")[2]
    assert [path.name for path in Path.cwd().iterdir()] == ["a"]
    file.write_bytes(data[:-100])
    assert "is truncated" in merge("a", "-o", "merged.ckpt")[2]
    file.unlink()
    assert "is missing" in merge("a", "-o", "merged.ckpt")[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "exists.ckpt"], "exists.ckpt exists; --overwrite"),
        (["-o", "merged.pt"], "must end in .ckpt or .safetensors"),
        (["-o", "nowhere/merged.ckpt"], "nowhere: no such folder"),
        (["-o", "m.ckpt", "--weights", "1", "1"], "must sum to 1, and sum to 2"),
        (["-o", "m.ckpt", "--scheme", "exponential", "--alpha", "2"], "alpha=2.0 is not allowed"),
        (["-o", "m.ckpt", "--scheme", "step"], "--scheme step needs checkpoints of different steps"),
        (["-o", "m.ckpt", "--scheme", "posthoc", "--sigma-rel", "0.1"], "0.pt does not say its step"),
        (["-o", "m.ckpt", "--copy", "*.bias"], "copy='*.bias' matches no tensor. There are: w, n"),
        pytest.param(
            ["-o", "m.ckpt", "--search", "greedy", "--metric", "val_loss", "--config", "c.yaml"],
            "c.yaml: no such config",
            marks=pytest.mark.needs("jsonargparse"),
        ),
    ],
)
def test_wrong_wishes(merge, tmp_path, options, message):
    paths = save_plain(tmp_path, 2)
    (tmp_path / "exists.ckpt").write_text("mine")
    before = sorted(tmp_path.iterdir())
    status, _, err = merge(*[path.name for path in paths], *options)
    assert status == 1
    assert message in err
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "exists.ckpt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "0.1"], "--alpha has an effect only with --scheme exponential"),
        (["--weights", "1"], "--weights: 1 for 2 checkpoints"),
        (["--weights", "1", "0", "--scheme", "linear"], "exclude each other"),
        (["--metric", "val_loss"], "--metric has an effect only with --search"),
        (["--search", "greedy"], "needs --metric and --config"),
        (["--scheme", "posthoc"], "needs --sigma-rel"),
    ],
)
def test_options_without_effect_are_refused(merge, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        merge(*save_plain(tmp_path, 2), "-o", "merged.ckpt", *options)
    assert message in capsys.readouterr().err


# --- search ---------------------------------------------------------------------------------------------------------


def config(**more):
    settings = {
        "seed_everything": 1,
        "model": "tests.cli.test_merge.Net",
        "data": "tests.cli.test_merge.Data",
        "trainer": {"accelerator": "cpu", "limit_val_batches": 1, "max_steps": 5},
        "ckpt_path": None,
        **more,
    }
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    return "config.yaml"


def of_constant(values):
    """Checkpoints whose weight is a constant; the loss is (constant - 1.5)^2."""
    paths = []
    for i, value in enumerate(values):
        net = Net()
        net.embed.weight.data.fill_(value)
        paths.append(f"{i}.ckpt")
        torch.save({"state_dict": net.state_dict(), "hyper_parameters": {"width": 32}, "global_step": i}, paths[-1])
    return paths


def merged_constant():
    return Net.load_from_checkpoint("merged.ckpt").embed.weight[0, 0].item()


@pytest.mark.needs("jsonargparse")
def test_a_greedy_soup_keeps_what_helps(merge):
    paths = of_constant([1.0, 5.0, 2.0])
    status, out, err = merge(
        *paths, "-o", "merged.ckpt", "--search", "greedy", "--metric=val_loss", "--config", config()
    )
    assert status == 0, err
    assert merged_constant() == pytest.approx(1.5)
    assert "val_loss 0 after 5 validations; the best single checkpoint has 0.25." in out
    about = torch.load("merged.ckpt", weights_only=True)["lightning_eff_merge"]
    assert about["weights"] == [0.5, 0.0, 0.5]
    assert about["scheme"] == "greedy"
    assert about["val_loss"] == pytest.approx(0)
    assert sorted(path.name for path in Path.cwd().iterdir()) == sorted([*paths, "config.yaml", "merged.ckpt"])


@pytest.mark.needs("jsonargparse")
def test_an_evolution_may_subtract(merge):
    # Both are on the same side of 1.5: no average between them reaches it.
    paths = of_constant([3.0, 2.0])
    options = ["--search", "evolution", "--metric", "val_loss", "--evaluations", "60", "--seed", "1"]
    status, out, err = merge(*paths, "-o", "merged.ckpt", *options, "--config", config())
    assert status == 0, err
    assert merged_constant() == pytest.approx(1.5, abs=0.1)
    weights = torch.load("merged.ckpt", weights_only=True)["lightning_eff_merge"]["weights"]
    assert sum(weights) == pytest.approx(1)
    assert weights[0] < 0
    assert "after 60 validations; the best single checkpoint has 0.25." in out


@pytest.mark.needs("jsonargparse")
def test_the_class_of_the_model_can_be_named_beside_a_config_of_arguments(merge):
    names = ["--model", "tests.cli.test_merge.Net", "--data", "tests.cli.test_merge.Data"]
    options = ["--search", "greedy", "--metric", "val_loss", "--mode", "max", "--limit-val-batches", "1"]
    settings = config(model={"width": 32}, data=None)
    status, out, err = merge(*of_constant([1.0, 5.0]), "-o", "merged.ckpt", *options, *names, "--config", settings)
    assert status == 0, err
    assert merged_constant() == pytest.approx(5.0)
    assert "val_loss 12.25 after 3 validations; the best single checkpoint has 12.25." in out


@pytest.mark.needs("jsonargparse")
@pytest.mark.parametrize(
    ("more", "metric", "message"),
    [
        ({}, "accuracy", "metric='accuracy' is not logged by the validation; it logs val_loss"),
        (
            {"model": {"class_path": "tests.cli.test_merge.Net", "init_args": {"width": 8}}},
            "val_loss",
            "differ in shape",
        ),
        ({"model": {"width": 8}}, "val_loss", "does not say the class of the model: name it with --model"),
    ],
)
def test_a_search_that_cannot_work(merge, more, metric, message):
    paths = of_constant([1.0, 2.0])
    options = ["--search", "greedy", "--metric", metric, "--config", config(**more)]
    status, _, err = merge(*paths, "-o", "merged.ckpt", *options)
    assert status == 1
    assert message in err
    assert not Path("merged.ckpt").exists()
