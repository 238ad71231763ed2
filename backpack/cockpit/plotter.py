"""The original's ``CockpitPlotter``: the instruments of a ``Cockpit``, or of what it has written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from backpack.cockpit.cockpit import Cockpit
from backpack.cockpit.history import History

_ROOTS = {"GradNorm": "grad_norm", "UpdateSize": "update_size", "Distance": "distance"}
_SUMS = {"HessTrace": "hess_trace"}
_PLAIN = {
    "Loss": "loss",
    "Alpha": "alpha",
    "NormTest": "norm_test",
    "InnerTest": "inner_test",
    "OrthoTest": "ortho_test",
    "CABS": "cabs",
    "EarlyStopping": "early_stopping",
    "MeanGSNR": "mean_gsnr",
    "TICDiag": "tic_diag",
    "TICTrace": "tic_trace",
    "HessMaxEV": "hess_max_ev",
    "learning_rate": "learning_rate",
    "train_accuracy": "train_accuracy",
    "valid_accuracy": "valid_accuracy",
    "test_accuracy": "test_accuracy",
    "train_loss": "train_loss",
    "valid_loss": "valid_loss",
    "test_loss": "test_loss",
}


def history_of(source: Cockpit | str | Path, discard: int | None = None) -> History:
    """What a ``Cockpit`` has tracked, as a history.

    Args:
        source: the ``Cockpit``, or the path that it was written to (without ``.json``).
        discard: the last step that counts.

    Raises:
        ValueError: if there is no such file.
    """
    history = History()
    if isinstance(source, Cockpit):
        output: dict[Any, Any] = source.get_output()
        history.begin(optimizer=source._optimizer_name)
    else:
        path = Path(f"{source}.json")
        if not path.exists():
            raise ValueError(f"{path} is neither a Cockpit nor the path of a log")
        output = json.loads(path.read_text(), object_hook=_decode)
        # .../problem/optimizer/setting/file
        history.begin(optimizer=path.parts[-3] if len(path.parts) > 3 else None)
    for step in sorted(map(int, output)):
        if discard is None or step <= discard:
            values = output[step] if step in output else output[str(step)]
            history.add(step, dict(_translated(values)))
    return history


def _decode(value: dict[str, Any]) -> Any:
    return value.get("__ndarray__", value)


def _translated(values: dict[str, Any]) -> Any:
    for name, value in values.items():
        if name in _PLAIN:
            yield _PLAIN[name], float(value)
        elif name in _ROOTS or name in _SUMS:
            key, parts = (_ROOTS | _SUMS)[name], [float(v) for v in value]
            yield key, sum(parts) if name in _SUMS else sum(v * v for v in parts) ** 0.5
            for j, part in enumerate(parts):
                yield f"{key}/parameter {j}", part
        elif name == "GradHist1d":
            yield "grad_hist", {"edges": _listed(value["edges"]), "counts": _listed(value["hist"])}
        elif name == "GradHist2d":
            edges = [_listed(each) for each in value["edges"]]
            yield "grad_hist_2d", {"edges": edges, "counts": _listed(value["hist"])}


def _listed(value: Any) -> list[Any]:
    return value.tolist() if hasattr(value, "tolist") else list(value)


class CockpitPlotter:
    """Draws the instruments, with matplotlib.

    Args:
        secondary_screen: accepted; all instruments are in one figure.
    """

    def __init__(self, secondary_screen: bool = False) -> None:
        self.secondary_screen = secondary_screen
        self.figure: Any = None

    def plot(
        self,
        source: Cockpit | str | Path,
        show_plot: bool = True,
        block: bool = False,
        save_plot: bool = False,
        savedir: str | Path | None = None,
        savename: str = "cockpit",
        savename_append: str | None = None,
        savefig_kwargs: dict[str, Any] | None = None,
        show_log_iter: bool = False,
        discard: int | None = None,
        plot_title: str | None = None,
        debug: bool = False,
    ) -> None:
        """Draw what was tracked so far.

        Args:
            source: a ``Cockpit``, or the path that it was written to (without ``.json``).
            show_plot: show it in a window.
            block: wait until the window is closed.
            save_plot: save it as ``<savedir>/<savename>__primary[__<savename_append>].png``.
            savedir: where to; by default beside the log.
            savename: the beginning of the file's name.
            savename_append: its end.
            savefig_kwargs: for matplotlib; ``"format"`` is the file's ending.
            show_log_iter: a logarithmic scale of steps.
            discard: the last step that counts.
            plot_title: by default the optimizer's name.
            debug: warn where there is nothing to draw.

        Raises:
            ValueError: if the source is neither, or a live ``Cockpit`` is saved without ``savedir``.
        """
        from backpack.cockpit.figure import figure

        history = history_of(source, discard)
        name = history.header.get("optimizer")
        title = plot_title or ("Cockpit" if name is None else f"Cockpit for {name}")
        self.figure = figure(history, title)
        if debug and not self.figure.axes:
            warnings.warn("there is nothing to draw yet", stacklevel=2)
        if show_log_iter:
            for ax in self.figure.axes:
                if ax.get_xlabel() == "step":
                    ax.set_xscale("symlog")
        if save_plot:
            self._save(source, savedir, savename, savename_append, dict(savefig_kwargs or {}))
        if show_plot:
            from backpack.cockpit.report import show_figure

            show_figure(self.figure, block)

    def _save(
        self,
        source: Cockpit | str | Path,
        savedir: str | Path | None,
        savename: str,
        append: str | None,
        options: dict[str, Any],
    ) -> None:
        if savedir is None and isinstance(source, Cockpit):
            raise ValueError("to save the plot of a live Cockpit, say where (savedir)")
        folder = Path(str(source)).parent if savedir is None else Path(savedir)
        folder.mkdir(parents=True, exist_ok=True)
        ending = options.get("format", "png")
        end = "" if append is None else f"__{append}"
        self.figure.savefig(folder / f"{savename}__primary{end}.{ending}", **options)

    def build_animation(self, logpath: str | Path, duration: int = 200, loop: int = 0) -> None:
        """Make a GIF of the plots of epochs that were saved beside a log (pillow must be installed).

        Args:
            logpath: the path of the log, without ``.json``.
            duration: milliseconds for each.
            loop: how often it is shown; 0: for ever.
        """
        from PIL import Image

        path = Path(logpath)
        files = sorted(path.parent.glob(f"{path.name}__primary__epoch__*.png"))
        frames = [Image.open(file) for file in files]
        if frames:
            frames[0].save(
                path.parent / f"{path.name}__primary.gif",
                save_all=True,
                append_images=frames[1:],
                duration=duration,
                loop=loop,
            )
