"""The experiments: networks, data, runs that can be resumed, what is chosen, and what is drawn."""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from experiments import data as loaders
from experiments import report, store
from experiments.__main__ import main
from experiments.data import Data, Part, read_idx, split
from experiments.optimizers import OPTIMIZERS
from experiments.problems import PROBLEMS, Problem, training_mode
from experiments.training import CURVES, Diverged, Setting, Trainer, train

LOGREG = Setting("digits-logreg", "SGD", 0.1, None, 0, 2, 64, 128)


def small(problem: str = "digits-logreg") -> Data:
    return PROBLEMS[problem].load(None).first(128)


def cli(*arguments: str, output: Path) -> str:
    """What a successful command prints."""
    console = Console(file=io.StringIO(), width=300)
    where = "--output" if arguments[0] in ("run", "time") else "--results"
    assert main([*arguments, where, str(output)], console) == 0
    return console.file.getvalue()


# --------------------------------------------------------------------------------------
# Problems

COUNTS = {
    "digits-logreg": ((1, 8, 8), 10, 650),
    "digits-cnn": ((1, 8, 8), 10, 3_658),
    "mnist-logreg": ((1, 28, 28), 10, 7_850),
    "mnist-2c2d": ((1, 28, 28), 10, 3_274_634),
    "fmnist-2c2d": ((1, 28, 28), 10, 3_274_634),
    "cifar10-3c3d": ((3, 32, 32), 10, 895_210),
    "cifar100-allcnnc": ((3, 32, 32), 100, 1_387_108),
    "svhn-wrn164": ((3, 32, 32), 10, 2_748_890),
    "tolstoi-char-rnn": ((50,), 83, 285_523),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_networks(name: str) -> None:
    shape, classes, count = COUNTS[name]
    with torch.device("meta"):
        model = PROBLEMS[name].build(classes)
        x = torch.zeros(2, *shape, dtype=torch.long if len(shape) == 1 else None)
        positions = shape if len(shape) == 1 else ()
        assert model(x).shape == (2, classes, *positions)
    assert sum(p.numel() for p in model.parameters()) == count


def test_all_cnn_c_has_the_benchmarks_dropout() -> None:
    modules = PROBLEMS["cifar100-allcnnc"].build(100).modules()
    assert [each.p for each in modules if isinstance(each, nn.Dropout)] == [0.2, 0.5, 0.5]


class Noisy(nn.Sequential):
    """Batch norm and dropout, for digits."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(
            *(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU()),
            nn.Linear(16, classes),
        )


@pytest.mark.parametrize("optimizer", ["SGD", "DiagGGNExact"])
def test_batch_norm_keeps_first_statistics(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROBLEMS, "noisy", Problem("noisy", loaders.digits, Noisy, 64, 1, 0.5))
    data = small()
    trainer = Trainer(Setting("noisy", optimizer, 0.01, 1.0, 0, 1, 64), data)
    norm = trainer.model[2]
    with torch.no_grad():
        expected = trainer.model[1](data.train.x.flatten(1))
    trainer.epoch(lambda: None)
    torch.testing.assert_close(norm.running_mean, expected.mean(0))
    torch.testing.assert_close(norm.running_var, expected.var(0))
    group = trainer.optimizer.param_groups[0]
    assert group["weight_decay" if optimizer == "SGD" else "l2"] == 0.5
    training_mode(trainer.model)
    assert trainer.model.training and not norm.training
    assert trainer.evaluate(data.test) == trainer.evaluate(data.test), "dropout is not off"


# --------------------------------------------------------------------------------------
# Data


def test_split_is_disjoint_and_complete() -> None:
    numbers = torch.arange(103)
    parts = split(Part(numbers, numbers), 0.7, 0.1, 0.2)
    assert [len(part.y) for part in parts] == [72, 10, 21]
    assert torch.cat([part.y for part in parts]).sort().values.equal(numbers)
    assert all(part.x.equal(part.y) for part in parts)


def test_digits() -> None:
    data = loaders.digits(None)
    assert [tuple(part.x.shape) for part in data[:3]] == [(n, 1, 8, 8) for n in (1078, 360, 359)]
    assert float(data.train.x.min()) == 0 and float(data.train.x.max()) == 1


def write_idx(path: Path, values: np.ndarray) -> None:
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = head + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_images(folder: Path, prefix: str, count: int, end: str = "") -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(count)
    x, y = draw.integers(256, size=(count, 28, 28)), draw.integers(10, size=count)
    write_idx(folder / f"{prefix}-images-idx3-ubyte{end}", x)
    write_idx(folder / f"{prefix}-labels-idx1-ubyte{end}", y)
    return torch.tensor(x), torch.tensor(y)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files(tmp_path: Path, end: str) -> None:
    x, y = write_images(tmp_path, "t10k", 20, end)
    assert read_idx(tmp_path / f"t10k-images-idx3-ubyte{end}").equal(x.to(torch.uint8))
    data = loaders.mnist(tmp_path)
    assert [len(part.y) for part in data[:3]] == [14, 2, 4]
    assert "14 / 2 / 4" in data.note
    found = {
        tuple(image.flatten().tolist()): int(k)
        for part in data[:3]
        for image, k in zip(*part, strict=True)
    }
    assert found == {
        tuple((a.float() / 255).flatten().tolist()): int(k) for a, k in zip(x, y, strict=True)
    }


def test_both_pairs_of_idx_files(tmp_path: Path) -> None:
    write_images(tmp_path / "FashionMNIST/raw", "train", 12)
    _, labels = write_images(tmp_path / "FashionMNIST/raw", "t10k", 5, ".gz")
    data = loaders.fashion_mnist(tmp_path)
    assert [len(part.y) for part in data[:3]] == [10, 2, 5] and not data.note
    assert data.test.y.equal(labels)
    with pytest.raises(FileNotFoundError, match="torchvision.datasets.MNIST"):
        loaders.mnist(tmp_path)


def test_damaged_idx_files(tmp_path: Path) -> None:
    write_images(tmp_path, "t10k", 5)
    images, labels = (tmp_path / f"t10k-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    write_idx(labels, np.zeros(4))
    with pytest.raises(ValueError, match="do not match"):
        loaders.mnist(tmp_path)
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match="3919 bytes where its head announces 3920"):
        read_idx(images)
    images.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(images)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "SVHN"])
def test_colour_images(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's datasets, whose layouts differ, by a stand-in with the same attributes."""
    count = {True: 10_030, False: 20}
    train = np.random.default_rng(0).integers(256, size=(10_030, 3, 32, 32), dtype=np.uint8)

    def dataset(root: str, train_set: bool) -> Any:
        x = train[: count[train_set]]
        labels = np.arange(len(x)) % 10
        if name == "SVHN":
            return types.SimpleNamespace(data=x, labels=labels)
        return types.SimpleNamespace(data=x.transpose(0, 2, 3, 1), targets=labels.tolist())

    def cifar(root: str, train: bool) -> Any:
        return dataset(root, train)

    def svhn(root: str, split: str) -> Any:
        return dataset(root, split == "train")

    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(CIFAR10=cifar, CIFAR100=cifar, SVHN=svhn)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    data = getattr(loaders, name.lower())(tmp_path)
    assert [tuple(part.x.shape) for part in data[:3]] == [(n, 3, 32, 32) for n in (30, 10_000, 20)]
    torch.testing.assert_close(data.train.x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.x.std((0, 2, 3)), torch.ones(3))
    # The test images are the first of the training file: the same numbers, normalized the same way.
    scale = data.test.x[1, 2, 3:5, 5].diff() / torch.tensor(train[1, 2, 3:5, 5] / 255.0).diff().float()
    again = (
        data.test.x[7, 2, 9:11, 0].diff() / torch.tensor(train[7, 2, 9:11, 0] / 255.0).diff().float()
    )
    torch.testing.assert_close(scale, again, rtol=1e-4, atol=0)
    assert data.test.y[:3].tolist() == [0, 1, 2]


def test_colour_images_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        loaders.cifar10(tmp_path)

    def missing(root: str, train: bool) -> Any:
        raise RuntimeError("Dataset not found or corrupted.")

    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(CIFAR10=missing)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    with pytest.raises(FileNotFoundError, match="download=True"):
        loaders.cifar10(tmp_path)


def test_text(tmp_path: Path) -> None:
    text = "".join(chr(97 + (7 * j) % 26) for j in range(1013)) + "\N{LATIN SMALL LETTER E WITH ACUTE}"
    (tmp_path / "war_and_peace.txt").write_text("\ufeff" + text, encoding="utf-8")
    data = loaders.war_and_peace(tmp_path, steps=10)
    assert data.classes == 28
    assert [len(part.y) for part in data[:3]] == [81, 10, 10]
    ids = torch.cat([part.x.flatten() for part in data[:3]])
    letters = sorted(set("\ufeff" + text))
    assert "".join(letters[j] for j in ids) == ("\ufeff" + text)[:1010]
    assert torch.cat([part.y.flatten() for part in data[:3]])[:-1].equal(ids[1:])
    (tmp_path / "war_and_peace.txt").write_text("too short")
    with pytest.raises(ValueError, match="9 characters"):
        loaders.war_and_peace(tmp_path)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if not n.startswith("digits")])
def test_absent_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = PROBLEMS[name].load
    with pytest.raises(FileNotFoundError, match="--data or by the variable BACKPACK_DATA"):
        load(None)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load(tmp_path / "nowhere")
    if load not in (loaders.cifar10, loaders.cifar100, loaders.svhn):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            load(tmp_path)


# --------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(name: str) -> None:
    damping = 0.1 if OPTIMIZERS[name].damped else None
    record = train(Setting("digits-logreg", name, 0.1, damping, 0, 2, 32, 128), small())
    assert record["diverged"] is None
    loss = record["curves"]["train_loss"]
    assert loss[2] < loss[1] < loss[0]


def test_record() -> None:
    record = train(LOGREG, small())
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["parameters"] == 650
    assert record["data"] == {"train": 128, "validation": 128, "test": 128, "note": ""}
    assert {"backpack", "torch", "python", "threads", "cpu", "cores", "gpu"} <= record[
        "environment"
    ].keys()
    assert record["curves"].keys() == {"epoch", "seconds", *CURVES}
    assert all(len(values) == 3 for values in record["curves"].values())
    assert record["curves"]["epoch"] == [0, 1, 2]
    assert 0 == record["curves"]["seconds"][0] < record["curves"]["seconds"][1]
    assert 0 < record["test"]["accuracy"] <= 1


def test_loss_is_that_of_plain_training() -> None:
    data = small()
    record = train(LOGREG, data)
    torch.manual_seed(0)
    model = PROBLEMS["digits-logreg"].build(10)
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for index in torch.randperm(128, generator=order).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.train.x[index]), data.train.y[index]).backward()
            optimizer.step()
    with torch.no_grad():
        f = model(data.validation.x)
        loss = nn.functional.cross_entropy(f, data.validation.y)
        accuracy = (f.argmax(1) == data.validation.y).double().mean()
    assert record["curves"]["validation_loss"][-1] == pytest.approx(float(loss), rel=1e-5)
    assert record["curves"]["validation_accuracy"][-1] == pytest.approx(float(accuracy), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["Adam", "KFAC"])
def test_seeds(optimizer: str) -> None:
    data, damping = small("digits-cnn"), 0.1 if optimizer == "KFAC" else None
    runs = [
        train(Setting("digits-cnn", optimizer, 0.01, damping, seed, 1, 32, 64), data)["curves"]
        for seed in (1, 1, 2)
    ]
    first, again, other = ({name: run[name] for name in CURVES} for run in runs)
    assert first == again != other


def test_divergence_is_recorded() -> None:
    record = train(Setting("digits-cnn", "SGD", 1e30, None, 0, 3, 32, 128), small("digits-cnn"))
    assert record["diverged"].startswith("epoch 1: ")
    assert record["test"] is None
    assert record["curves"]["epoch"] == [0]
    json.dumps(record, allow_nan=False)


def test_other_errors_are_no_divergence() -> None:
    trainer = Trainer(Setting("digits-logreg", "KFAC", 0.1, 0.1, 0, 1, 64), small())
    x, y = small().train
    with pytest.raises(IndexError):
        trainer.step(x, y + 10)
    with pytest.raises(Diverged, match="loss is not finite"):
        trainer.step(x * float("nan"), y)


def test_factors_that_cannot_be_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    record = train(Setting("digits-logreg", "EKFAC", 0.1, 0.1, 0, 1, 64), small())
    assert record["diverged"] == "epoch 1: the algorithm failed to converge"


def test_what_is_not_offered() -> None:
    with pytest.raises(ValueError, match="thousands of columns"):
        Trainer(Setting("tolstoi-char-rnn", "KFLR", 0.1, 0.1, 0, 1, 8), small())
    with pytest.raises(ValueError, match="a batch of 500"):
        Trainer(Setting("digits-logreg", "SGD", 0.1, None, 0, 1, 500), small())


# --------------------------------------------------------------------------------------
# Command line: search, resume, draw

QUICK = "run --problem digits-logreg --epochs 1 --samples 64 --batch 32".split()


def test_runs_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*QUICK, *"--optimizer SGD KFLR --lr 0.01 0.1 --damping 0.1 1 --seeds 2".split()]
    step, steps = Trainer.step, iter(range(9))

    def killed(self: Trainer, x: Tensor, y: Tensor) -> None:
        if next(steps) == 8:
            raise KeyboardInterrupt
        step(self, x, y)

    # Interrupted between the steps of the fifth run, the first of the second optimizer.
    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        cli(*command, output=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 4
    monkeypatch.setattr(Trainer, "step", step)
    assert "6 runs made" in cli(*command, output=tmp_path)
    assert len(list(tmp_path.rglob("*.json"))) == 2 + 2 + 4 + 2
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())

    monkeypatch.setattr(Trainer, "step", None)
    assert "0 runs made" in cli(*command, output=tmp_path)
    # A grid that grows leaves one choice, in tables and for further seeds.
    monkeypatch.setattr(Trainer, "step", step)
    assert "1 runs made" in cli(
        *command, *"--lr 1e-9 --damping 1 --optimizer KFLR".split(), output=tmp_path
    )
    ((_, kflr),) = store.choose(store.read(tmp_path)[0]).values()
    assert kflr.tried == 5 and [run["setting"]["seed"] for run in kflr.runs] == [1, 2]


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    store.write(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError):
        store.write(tmp_path / "a.json", {"new": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def fabricated(lr: float, damping: float, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    curves = {"validation_accuracy": [0.1, accuracy], "validation_loss": [2.0, more.get("loss", 1.0)]}
    setting = Setting("digits-logreg", "KFAC", lr, damping, seed, 1, 64)
    return {"setting": vars(setting), "curves": curves, "diverged": more.get("diverged")}


def test_choice() -> None:
    runs = [
        fabricated(0.1, 0.1, 0, 0.9),
        fabricated(0.1, 1.0, 0, 0.9, loss=0.5),
        fabricated(0.1, 10.0, 0, 0.8),
        fabricated(1.0, 1.0, 0, 0.99, diverged="epoch 2: the loss is not finite"),
        fabricated(1.0, 0.1, 0, 0.7),
        # Seeds that are reported decide nothing.
        fabricated(0.1, 1.0, 1, 0.2),
        fabricated(0.1, 1.0, 2, 0.3),
        fabricated(1.0, 0.1, 1, 1.0),
    ]
    ((chosen,),) = store.choose(runs).values()
    assert (chosen.setting["lr"], chosen.setting["damping"], chosen.tried) == (0.1, 1.0, 5)
    assert [run["setting"]["seed"] for run in chosen.runs] == [1, 2]
    assert chosen.final("validation_accuracy") == pytest.approx(0.25)
    assert chosen.edges == {"lr": "lower edge", "damping": "inside"}
    ((alone,),) = store.choose(runs[:1]).values()
    assert alone.edges == {"lr": "fixed", "damping": "fixed"} and len(alone.runs) == 1


def test_figures_and_tables(tmp_path: Path) -> None:
    output = tmp_path / "results"
    cli(*QUICK, *"--optimizer SGD KFLR --lr 0.01 0.1 --damping 0.1 --seeds 3".split(), output=output)
    cli(*"time --problem digits-logreg --optimizer SGD KFAC --rounds 2".split(), output=output)
    printed = cli("table", output=output)
    assert "| KFLR" in printed and "| KFAC" in printed and "edge" in printed
    assert "KFLR" not in cli("table", "--optimizer", "SGD", output=output)
    packed = tmp_path / "packed.json"
    cli("pack", str(packed), output=output)
    assert cli("table", output=packed) == printed
    cli("plot", output=output)
    cli("plot", "--figures", str(tmp_path / "again"), output=packed)
    names = ["digits-logreg-1-epochs-batch-32-64-samples.png", "step-times.png"]
    for folder in (output, tmp_path / "again"):
        assert sorted(path.name for path in folder.glob("*.png")) == names
        assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names)
    short = [run for run in json.loads(packed.read_text())["runs"] if len(run["curves"]["epoch"]) == 1]
    assert {run["setting"]["seed"] for run in short} == {store.SEARCH_SEED}


def test_every_optimizer_has_a_colour_of_its_own() -> None:
    assert report.COLORS.keys() == OPTIMIZERS.keys()
    assert len(set(report.COLORS.values())) == len(OPTIMIZERS)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run --problem mnist-logreg --data /nowhere", "MNIST: there is no folder /nowhere"),
        ("run --problem tolstoi-char-rnn --optimizer KFLR", "KFLR is not offered"),
        ("run --problem digits-logreg --batch 5000", "a batch of 5000"),
        ("table --results /nowhere", "no results in /nowhere"),
    ],
)
def test_errors(command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = ["--output", str(tmp_path)] if command.startswith("run") else []
    assert main([*command.split(), *output], Console(quiet=True)) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "options", ["--lr -1", "--damping 0", "--lr nan", "--epochs 0", "--optimizer Nadam", "--seeds -1"]
)
def test_options_out_of_range(options: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main([*"run --problem digits-logreg".split(), *options.split()])
    assert "error: argument" in capsys.readouterr().err
