"""The monitor inside real trainers and loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack.cockpit import LightningCockpit, TransformersCockpit, watch

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_of_transformers(bf16: bool, tmp_path: Path) -> None:
    """Loss and gradient norm are those that the trainer logs: of all micro-batches, before clipping."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)
    rows = torch.randint(64, (64, 12))
    callback: Any = TransformersCockpit(every=1, quantities="business")
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=5,
        max_grad_norm=0.1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=bf16,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[callback],
    )
    trainer.train()
    history = callback.monitor.history()
    assert callback.monitor.left_out == {}
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert history.steps == [entry["step"] - 1 for entry in logged] == list(range(5))
    for entry in logged:
        values = history.at(entry["step"] - 1)
        assert values["loss"] == pytest.approx(entry["loss"], rel=1e-3)
        assert values["grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-3)
    assert {"norm_test", "inner_test", "hess_trace", "mean_gsnr"} <= set(history.at(1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_of_lightning(accumulate: int, tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.utilities import grad_norm

    seen: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(float(grad_norm(self, 2)["grad_2.0_norm_total"]))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    def fit(callback: Any, epochs: int, **options: Any) -> Any:
        data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=CSVLogger(tmp_path),
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.05,
            callbacks=[callback],
            default_root_dir=tmp_path,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8), **options)
        return trainer

    torch.manual_seed(0)
    callback: Any = LightningCockpit(every=1, quantities="business")
    trainer = fit(callback, 2)
    history, steps = callback.monitor.history(), 16 // accumulate
    assert callback.monitor.left_out == {} and history.steps == list(range(steps))
    _, norms = history.column("grad_norm")
    assert norms == pytest.approx(seen, rel=1e-3)
    assert "norm_test" in Path(trainer.logger.experiment.metrics_file_path).read_text()
    # A checkpoint goes on.
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again: Any = LightningCockpit(every=1, quantities="business")
    fit(again, 3, ckpt_path=tmp_path / "last.ckpt")
    assert again.monitor.history().steps == list(range(24 // accumulate))
    assert again.monitor.history().at(1) == history.at(1)


def test_event_files(tmp_path: Path) -> None:
    """Written by TensorBoard's writer, and read back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer, model = SummaryWriter(str(tmp_path)), nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1, log=writer) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
            optimizer.step()
    writer.close()
    events = EventAccumulator(str(tmp_path), {"histograms": 0})
    events.Reload()
    found = [event.value for event in events.Scalars("cockpit/loss")]
    assert found == pytest.approx(monitor.history().column("loss")[1])
    assert len(events.Histograms("cockpit/grad_hist")) == 3


def test_data_frames() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=2) as monitor:
        for _ in range(5):
            nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
            optimizer.step()
    frame = monitor.history().to_pandas()
    assert list(frame.index) == [0, 2, 4]
    assert list(frame["loss"]) == monitor.history().column("loss")[1]
    assert "grad_hist" not in frame


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    """Its prepared model and optimizer; gradients accumulated, then clipped."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, norms = [], []
    with watch(model, optimizer, quantities="business", every=1) as monitor:
        for X, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(X), y)
                accelerator.backward(loss)
                losses.append(loss.item() / 2)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.1)))
                optimizer.step()
                optimizer.zero_grad()
    history = monitor.history()
    assert monitor.left_out == {} and history.steps == list(range(4))
    assert history.column("grad_norm")[1] == pytest.approx(norms, rel=1e-3)
    sums = [a + b for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert history.column("loss")[1] == pytest.approx(sums, rel=1e-3)
    assert {"norm_test", "inner_test", "hess_trace", "mean_gsnr", "alpha"} <= set(history.at(1))


def test_a_scaler_of_half_precision() -> None:
    """A loss scaled for fp16, autocast, unscaled before clipping: numbers are of the loss itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses, norms = [], []
    with watch(model, optimizer, quantities="business", every=1) as monitor:
        for _ in range(4):
            X, y = torch.randn(16, 4), torch.randint(3, (16,))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(model(X), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            losses.append(loss.item())
            scaler.step(optimizer)
            scaler.update()
    history = monitor.history()
    assert monitor.left_out == {} and history.steps == list(range(4))
    assert history.column("loss")[1] == pytest.approx(losses, rel=1e-3)
    assert history.column("grad_norm")[1] == pytest.approx(norms, rel=1e-3)
    assert {"norm_test", "inner_test", "hess_trace", "mean_gsnr", "alpha"} <= set(history.at(1))
