"""The plots of a comparison, drawn with matplotlib where it is installed (``pip install -e ".[plot]"``)."""

from __future__ import annotations

import sys
from pathlib import Path


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


def plot_comparison(folder: Path, results: dict[str, dict]) -> None:
    """Quality against trained numbers, and against peak memory; the base's own quality as lines across."""
    plt = pyplot()
    if plt is None:
        return
    points = {name: row for name, row in results.items() if "trained_numbers" in row and "right" in row}
    levels = {name: row for name, row in results.items() if "trained_numbers" not in row}
    axes = {
        "trained_numbers": ("numbers trained", 1, "log"),
        "peak_memory": ("peak memory in training (GB)", 1e9, "linear"),
    }
    for key, (label, unit, scale) in axes.items():
        figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for name, row in points.items():
            low, high = row["right_interval"]
            error = [[100 * (row["right"] - low)], [100 * (high - row["right"])]]
            ax.errorbar(row[key] / unit, 100 * row["right"], yerror(error), fmt="o", capsize=3)
            ax.annotate(name, (row[key] / unit, 100 * row["right"]), xytext=(6, 4), textcoords="offset points")
        for name, row in levels.items():
            ax.axhline(100 * row["right"], color="grey", linewidth=0.8, linestyle="--")
            ax.annotate(name, (0.99, 100 * row["right"]), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        ax.set(xscale=scale, xlabel=label, ylabel="right answers (%), with 95 % intervals")
        ax.margins(0.12)
        figure.savefig(folder / f"quality_by_{key}.png", dpi=120)
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
    figure.savefig(folder / "gate.png", dpi=120)
    plt.close(figure)
