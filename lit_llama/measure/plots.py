"""The plots of runs and of comparisons, drawn with matplotlib where it is installed (``pip install -e ".[plot]"``)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lit_llama.common.errors import UserError
from lit_llama.common.files import atomic_write


def pyplot():
    """matplotlib, drawing into files; None, with a line that says so, where it is missing."""
    try:
        import matplotlib
    except ImportError:
        print('no plots: matplotlib is missing; pip install -e ".[plot]"', file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_runs(path: Path, runs: dict[str, list[dict]]) -> None:
    """Loss, validation loss, learning rate and tokens/s by step, a line for each run; rows as read_metrics gives them.

    Raises UserError if matplotlib is missing.
    """
    plt = pyplot()
    if plt is None:
        raise UserError(f'{path} was not written; run: pip install -e ".[plot]"')
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    (loss, validation), (rate, speed) = axes
    for name, rows in runs.items():
        steps = [int(row["step"]) for row in rows]
        losses = [float(row["loss"]) for row in rows]
        (line,) = loss.plot(steps, running_mean(losses), label=name)
        loss.plot(steps, losses, color=line.get_color(), alpha=0.2, linewidth=0.8)
        validated = [(int(row["step"]), float(row["val_loss"])) for row in rows if row["val_loss"]]
        validation.plot(*zip(*validated, strict=True) if validated else ([], []), marker="o", color=line.get_color())
        rate.plot(steps, [float(row["lr"]) for row in rows], color=line.get_color())
        tokens, seconds = ([float(row[key]) for row in rows] for key in ("tokens", "seconds"))
        speeds = [t / s for t, s in zip(running_mean(tokens), running_mean(seconds), strict=True)]
        speed.plot(steps, speeds, color=line.get_color())
    loss.set(ylabel="training loss per token")
    loss.legend()
    validation.set(ylabel="validation loss per token")
    rate.set(xlabel="step", ylabel="learning rate")
    speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    save_figure(figure, path)
    plt.close(figure)


def save_figure(figure: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:])


def running_mean(values: list[float]) -> list[float]:
    """Each value's mean with those before it, over a twentieth of them all: single steps are noisy."""
    width = max(1, len(values) // 20)
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot_comparison(folder: Path, results: dict[str, dict]) -> None:
    """Quality by trainable parameters and by peak memory, with the base's own quality as horizontal lines.

    The axis is that of the methods: a base below or above it has no line and is named in a corner. What no method has
    gets no plot: Windows does not tell the memory.
    """
    plt = pyplot()
    if plt is None:
        return
    points = {name: row for name, row in results.items() if "trained_parameters" in row and "right" in row}
    levels = {name: row for name, row in results.items() if "trained_parameters" not in row}
    axes = {
        "trained_parameters": ("trainable parameters", 1, "log"),
        "peak_memory": ("peak memory in training (GB)", 1e9, "linear"),
    }
    for key, (label, unit, scale) in axes.items():
        known = [(name, row) for name, row in points.items() if row[key] is not None]
        if not known:
            continue
        figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for i, (name, row) in enumerate(sorted(known, key=lambda point: point[1][key])):
            low, high = row["right_interval"]
            error = [[100 * (row["right"] - low)], [100 * (high - row["right"])]]
            marker = "os^Dv<>"[i % 7]  # 70 different points, with matplotlib's 10 colours
            ax.errorbar(row[key] / unit, 100 * row["right"], yerror(error), fmt=marker, capsize=3, label=name)
        ax.set(xscale=scale, xlabel=label, ylabel="right answers (%), with 95 % intervals")
        ax.margins(0.15)
        bottom, top = ax.get_ylim()
        beyond = []
        for name, row in levels.items():
            level = 100 * row["right"]
            text = f"{name}: {level:.1f} %"
            if bottom <= level <= top:
                ax.axhline(level, color="grey", linewidth=0.8, linestyle="--")
                ax.annotate(text, (0.99, level), xycoords=("axes fraction", "data"), ha="right", va="bottom")
            else:
                beyond.append(text)
        ax.annotate("\n".join(beyond), (0.99, 0.02), xycoords="axes fraction", ha="right", va="bottom")
        ax.set_ylim(bottom, top)
        figure.legend(loc="outside right upper", title="from left to right")
        save_figure(figure, folder / f"quality_by_{key}.png")
        plt.close(figure)


def yerror(error: list[list[float]]) -> list[list[float]]:
    """Lengths below and above; rounding may leave them a hair below zero at 0 % and 100 %."""
    return [[max(0.0, value) for value in side] for side in error]


def plot_ablations(folder: Path, curves: dict[str, list[float]]) -> None:
    """Training loss by step of runs that differ in their gates' start."""
    plt = pyplot()
    if plt is None or not curves:
        return
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in curves.items():
        ax.plot(range(1, len(losses) + 1), losses, label=name)
    ax.set(xlabel="step", ylabel="training loss per token")
    ax.legend()
    save_figure(figure, folder / "gate.png")
    plt.close(figure)
