"""Quantities and optimizers inside real trainers, as `docs/trainers.md` writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from backpack import backpack, extend, optim
from backpack import extensions as E
from backpack.testing.oracle import Oracle

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]
N, STEPS = 8, 3
Fields = dict[str, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def data(samples: int = N * STEPS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 4, generator=generator), torch.randint(
        3, (samples,), generator=generator
    )


def batches(size: int = N) -> Iterator[tuple[Tensor, Tensor]]:
    X, y = data()
    yield from zip(X.split(size), y.split(size), strict=True)


def fields(model: nn.Module, *names: str) -> list[Fields]:
    return [{name: getattr(p, name).clone() for name in names} for p in model.parameters()]


def agree(found: list[Fields], expected: list[Fields], digits: float = 1e-4) -> None:
    assert found and len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(
                one[name].float(), two[name], rtol=digits, atol=digits * float(two[name].max())
            )


def by_hand(train: Callable[[nn.Module, Tensor, Tensor], None], size: int = N) -> nn.Module:
    """A model trained in a plain loop."""
    model = net()
    for X, y in batches(size):
        train(model, X, y)
    return model


def kfac(parameters: Any) -> optim.KFAC:
    return optim.KFLR(parameters, lr=0.1, damping=0.1)


# --------------------------------------------------------------------------------------
# Lightning


def lightning_module(optimizer: Callable[[nn.Module], Any]) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = extend(net())
            self.seen: list[list[Fields]] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            group = distributed.group.WORLD if distributed.is_initialized() else None
            with backpack(E.Variance(), E.BatchL2Grad(), process_group=group):
                super().backward(loss, *args, **kwargs)

        def on_after_backward(self) -> None:
            self.seen.append(fields(self.model, "variance", "batch_l2"))
            self.log("noise", sum(p.variance.sum() for p in self.model.parameters()))

        def configure_optimizers(self) -> Any:
            return optimizer(self.model)

    return Module()


def fit(module: Any, folder: Path, **options: Any) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    trainer = pl.Trainer(
        max_epochs=1,
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **{"accelerator": "cpu", **options},
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=N)
    trainer.fit(module, loader)
    return trainer


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def expected_fields(scale: float = 1.0) -> list[list[Fields]]:
    """Of the batches, of a model that stands still."""
    found = []
    for X, y in batches():
        oracle = Oracle(net().double(), nn.CrossEntropyLoss(), X.double(), y)
        gradients = [scale * g.float() for g in oracle.grad_batch.values()]
        found.append(
            [
                {"variance": g.var(0, unbiased=False), "batch_l2": g.flatten(1).square().sum(1)}
                for g in gradients
            ]
        )
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 1e-3},
        {"accumulate_grad_batches": STEPS},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"precision": "16-mixed"},  # which Lightning takes for bf16 on a CPU
        {"precision": "16-true"},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
def test_quantities_in_lightning(options: dict[str, Any], tmp_path: Path) -> None:
    """Each backward pass has its own, with the factor of accumulation in its loss; they are logged."""
    module = lightning_module(lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    trainer = fit(module, tmp_path, **options)
    digits = 0.1 if "precision" in options else 1e-4
    for found, expected in zip(
        module.seen, expected_fields(1 / options.get("accumulate_grad_batches", 1)), strict=True
    ):
        agree(found, expected, digits)
    assert "noise" in Path(trainer.logger.experiment.metrics_file_path).read_text()


def test_quantities_in_lightning_with_several_processes(tmp_path: Path) -> None:
    """Those of the samples of all, in the order of ranks."""
    module, inputs = lightning_module(lambda model: torch.optim.SGD(model.parameters(), lr=0.0)), []
    module.model.register_forward_pre_hook(lambda model, args: inputs.append(args[0]))
    module.on_train_end = lambda: torch.save(
        (inputs, module.seen), tmp_path / f"{module.global_rank}.pt"
    )
    fit(module, tmp_path, strategy="ddp_fork", devices=2)
    (first, seen), (second, again) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    X, y = data()
    for one, two, found, other in zip(first, second, seen, again, strict=True):
        rows = torch.cat([one, two])
        order = (rows[:, None] == X).all(2).int().argmax(1)
        oracle = Oracle(net().double(), nn.CrossEntropyLoss(), rows.double(), y[order])
        gradients = [g.float() for g in oracle.grad_batch.values()]
        expected = [
            {"variance": g.var(0, unbiased=False), "batch_l2": g.flatten(1).square().sum(1)}
            for g in gradients
        ]
        agree(found, expected)
        agree(other, expected)


def lightning_with_optimizer() -> Any:
    module = lightning_module(kfac)

    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        optimizer = module.optimizers(use_pl_optimizer=False)
        with optimizer.backpack():
            loss.backward(*args, **kwargs)

    module.backward = backward
    module.on_after_backward = lambda: None
    return module


@pytest.mark.parametrize("accumulate", [1, STEPS])
def test_optimizers_in_lightning(accumulate: int, tmp_path: Path) -> None:
    module = lightning_with_optimizer()
    fit(module, tmp_path, accumulate_grad_batches=accumulate)
    model = net()
    optimizer = kfac(model)
    for X, y in batches(N * accumulate):
        optimizer.zero_grad()
        with optimizer.backpack():
            F.cross_entropy(model(X), y).backward()
        optimizer.step()
    for one, two in zip(module.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_optimizers_in_lightning_with_clipping(tmp_path: Path) -> None:
    """What is clipped is the gradient, before it meets the curvature."""
    module = lightning_with_optimizer()
    fit(module, tmp_path, gradient_clip_val=0.05)
    model = net()
    optimizer = kfac(model)
    for X, y in batches():
        optimizer.zero_grad()
        with optimizer.backpack():
            F.cross_entropy(model(X), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    for one, two in zip(module.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------
# Transformers


def language(**options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def trainer_of(model: Any, folder: Path, made: Any = None, **options: Any) -> Any:
    import transformers

    class Trainer(transformers.Trainer):
        seen: list[dict[str, Tensor]]

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            inner = self.optimizer
            while hasattr(inner, "optimizer"):
                inner = inner.optimizer
            own = isinstance(inner, optim.KFLR)
            block = inner.backpack(E.BatchL2Grad()) if own else backpack(E.BatchL2Grad(), E.Variance())
            with block:
                loss = super().training_step(model, inputs, num_items_in_batch)
            norms = {n: p.batch_l2.clone() for n, p in model.named_parameters() if p.requires_grad}
            self.seen.append(norms)
            self.log({"norm": float(sum(v.sum() for v in norms.values()))})
            return loss

    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=2, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    rows = torch.randint(32, (64, 12), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizers=(made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0))
        if made
        else (None, None),
    )
    trainer.seen = []
    return trainer


def norms_by_hand(model: Any, ids: Tensor, scale: float) -> dict[str, Tensor]:
    """Squared norms of each sequence's gradient."""
    found: dict[str, list[Tensor]] = {}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for row in ids:
        loss = scale * model(input_ids=row[None], labels=row[None]).loss
        for name, g in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
            found.setdefault(name, []).append(g.square().sum())
    return {name: torch.stack(each) for name, each in found.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-3},
        {"bf16": True},
        {"fp16": True},  # which does nothing on a CPU
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("lora", [False, True])
def test_quantities_in_the_trainer(options: dict[str, Any], lora: bool, tmp_path: Path) -> None:
    """Of the loss whose gradient is taken, which the trainer divides by all tokens of a step.

    It counts the first token of a row too, which no other predicts.
    """
    if options.get("gradient_checkpointing"):
        options = {**options, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = language()
    if lora:
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["c_attn"], lora_alpha=4)
        )
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    ids: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True
    )
    extend(model)
    trainer = trainer_of(model, tmp_path, learning_rate=0.0, **options)
    trainer.train()
    micro = options.get("gradient_accumulation_steps", 1)
    assert len(trainer.seen) == 2 * micro and any(
        "norm" in entry for entry in trainer.state.log_history
    )
    for seen, batch in zip(trainer.seen, list(ids), strict=True):
        with torch.autocast("cpu", enabled=False):
            expected = norms_by_hand(model, batch, 11 / 12 / (4 * micro))
        assert seen.keys() == expected.keys()
        digits = 0.1 if "bf16" in options else 1e-3
        for name in seen:
            torch.testing.assert_close(seen[name], expected[name], rtol=digits, atol=digits * 1e-3)


def test_optimizers_in_the_trainer(tmp_path: Path) -> None:
    model = language(tie_word_embeddings=False)
    ids: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True
    )
    trainer = trainer_of(model, tmp_path, kfac(model), gradient_accumulation_steps=2, max_grad_norm=0.5)
    trainer.train()
    again = language(tie_word_embeddings=False)
    optimizer = kfac(again)
    for i in range(0, len(ids), 2):
        optimizer.zero_grad()
        for batch in ids[i : i + 2]:
            with optimizer.backpack():
                (11 / 12 * again(input_ids=batch, labels=batch).loss / 2).backward()
        nn.utils.clip_grad_norm_(again.parameters(), 0.5)
        optimizer.step()
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------
# Accelerate


@pytest.mark.parametrize("accumulate", [1, STEPS])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_accelerate(accumulate: int, precision: str) -> None:
    """Quantities of micro-batches, and of all of a step; the library's optimizer, prepared."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
    )
    model = net()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=N)
    model, optimizer, loader = accelerator.prepare(model, kfac(model), loader)
    inner = optimizer.optimizer
    for X, y in loader:
        with accelerator.accumulate(model):
            with inner.backpack(E.BatchL2Grad()):
                accelerator.backward(F.cross_entropy(model(X), y))
            norms = fields(model, "batch_l2")
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
    assert norms[0]["batch_l2"].shape == (N,)
    again = net()
    plain = kfac(again)
    for X, y in batches(N * accumulate):
        plain.zero_grad()
        with plain.backpack():
            F.cross_entropy(again(X), y).backward()
        plain.step()
    digits = 0.05 if precision == "bf16" else 1e-4
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=digits, atol=digits)


# --------------------------------------------------------------------------------------
# The page


def test_the_page_runs(tmp_path: Path) -> None:
    """Its code, and each of its trainers for some steps."""
    import transformers
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    for kind in ("Classifier", "WithCurvature"):
        module = names[kind]()
        before = [p.clone() for p in module.parameters()]
        fit(module, tmp_path)
        assert not any(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(32, (16, 12))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = names["Trainer"](names["language"], arguments, train_dataset=rows)
    trainer.train()
    assert any("squared_norm" in entry for entry in trainer.state.log_history)
    before = [p.clone() for p in names["language"].parameters()]
    options: Any = {"train_dataset": rows, "optimizers": names["optimizers"]}
    names["CurvatureTrainer"](names["language"], arguments, **options).train()
    after = names["language"].parameters()
    assert sum(not torch.equal(p, old) for p, old in zip(after, before, strict=True)) == len(before)
