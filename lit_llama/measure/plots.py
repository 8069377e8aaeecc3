"""Plots of runs and comparisons, by matplotlib (``pip install -e ".[plot]"``)."""

from pathlib import Path
from typing import Any

from lit_llama.common.errors import UserError
from lit_llama.common.files import atomic_write


def new_figure(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes. Raises UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # pyplot would open windows
    except ImportError:
        raise UserError('plots need matplotlib; run: pip install -e ".[plot]"') from None
    figure = Figure(layout="constrained", **options)
    axes = figure.subplots(rows, columns, sharex=True)
    for ax in figure.axes:
        ax.grid(alpha=0.3)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:])


def plot_runs(path: Path, runs: dict[str, list[dict]]) -> None:
    """Loss, validation loss, learning rate and tokens/s by step, a line per run. ``read_metrics`` returns such rows."""
    figure, axes = new_figure(2, 2, figsize=(11, 7))
    (loss, validation), (rate, speed) = axes
    for name, rows in runs.items():
        steps, losses = column(rows, "step"), column(rows, "loss")
        (line,) = loss.plot(steps, running_mean(losses), label=name)
        color = line.get_color()
        loss.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
        validated = [row for row in rows if row.get("val_loss")]
        if validated:
            validation.plot(column(validated, "step"), column(validated, "val_loss"), marker="o", color=color)
        rate.plot(steps, column(rows, "lr"), color=color)
        means = (running_mean(column(rows, key)) for key in ("tokens", "seconds"))
        speed.plot(steps, [tokens / seconds for tokens, seconds in zip(*means, strict=True)], color=color)
    loss.set(ylabel="training loss per token", yscale="log")
    loss.legend()
    validation.set(ylabel="validation loss per token", yscale="log")
    rate.set(xlabel="step", ylabel="learning rate")
    speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
    save_figure(figure, path)


def column(rows: list[dict], key: str) -> list[float]:
    try:
        return [float(row[key]) for row in rows]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"a metrics.csv lacks the column {key}, or a number in it") from None


def running_mean(values: list[float]) -> list[float]:
    """The mean of each value and those before it, over a twentieth of all: single steps are noisy."""
    width = max(1, len(values) // 20)
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


# A color and a marker for each method and its variants, the same in all plots.
MARKERS = {
    "features": ("tab:gray", "X"),
    "output_layers": ("tab:brown", "s"),
    "full": ("black", "D"),
    "soft_prompt": ("tab:olive", "v"),
    "prefix": ("tab:green", "^"),
    "houlsby": ("tab:orange", "P"),
    "adapter": ("tab:blue", "o"),
    "adapter_v2": ("tab:cyan", "p"),
    "lora": ("tab:red", "*"),
}
OTHER_MARKER = ("tab:purple", "h")

AXES = {  # key: label, unit, scale
    "trained_parameters": ("trainable parameters", 1, "log"),
    "peak_memory": ("peak memory in training (GB)", 1e9, "linear"),
    "forgetting": ("rise of the loss on other data", 1, "linear"),
}


def plot_comparison(folder: Path, results: dict[str, dict]) -> None:
    """Quality by trainable parameters, peak memory and forgetting. The title names the data and the base's quality."""
    answered = {name: row for name, row in results.items() if "right" in row}
    bases = [f"{name}: {row['right']:.1%}" for name, row in answered.items() if "method" not in row]
    for key, (label, unit, scale) in AXES.items():
        rows = {name: row for name, row in answered.items() if row.get(key) is not None}
        if not rows:
            continue
        figure, ax = new_figure(figsize=(8, 5))
        points = {name: (row[key] / unit, 100 * row["right"], row["method"]) for name, row in rows.items()}
        for name, (x, y, method) in points.items():
            row, (color, marker) = rows[name], MARKERS.get(method, OTHER_MARKER)
            ax.vlines(x, *(100 * end for end in row["right_interval"]), color=color, alpha=0.5)
            if f"{key}_interval" in row:
                ax.hlines(y, *row[f"{key}_interval"], color=color, alpha=0.5)
            ax.plot(x, y, color=color, marker=marker, markersize=8)
        ax.set(xscale=scale, xlabel=label, ylabel="right answers (%), with 95 % intervals")
        ax.set_title(", ".join([folder.name, *bases]).replace("%", " %"), fontsize="small")
        ax.margins(0.15)
        label_points(ax, points)
        save_figure(figure, folder / f"quality_by_{key}.png")


def label_points(ax: Any, points: dict[str, tuple[float, float, str]]) -> None:
    """Write each name next to its point (x, y) in its method's color, clear of other names, points and the border."""
    ax.figure.draw_without_rendering()  # from now on the axes stay where they are
    places = {name: ax.transData.transform((x, y)) for name, (x, y, _) in points.items()}  # in pixels
    inside = ax.get_window_extent()
    offsets = [(side, height) for height in (4, -11, 15, -22, 26, -33, 37, -44) for side in (6, -6)]  # in points
    taken: list[Any] = []
    for name, (x, y, method) in points.items():
        for dx, dy in offsets:
            place = dict(xytext=(dx, dy), textcoords="offset points", ha="left" if dx > 0 else "right")
            text = ax.annotate(name, (x, y), **place, color=MARKERS.get(method, OTHER_MARKER)[0], fontsize="small")
            box = text.get_window_extent()
            others = [place for other, place in places.items() if other != name]
            free = not any(box.padded(6).contains(*place) for place in others)
            free &= not any(box.overlaps(other) for other in taken) and inside.x0 < box.x0 and box.x1 < inside.x1
            if free or (dx, dy) == offsets[-1]:
                break
            text.remove()
        taken.append(box)


def plot_variants(folder: Path, results: dict[str, dict]) -> None:
    """The loss of each variant of a method minus the method's own."""
    points = [(name, row) for name, row in results.items() if "minus_method" in row]
    if not points:
        return
    figure, ax = new_figure(figsize=(8, 1 + 0.4 * len(points)))
    for y, (_, row) in enumerate(points):
        color, marker = MARKERS.get(row["method"], OTHER_MARKER)
        ax.hlines(y, *row["minus_method_interval"], color=color)
        ax.plot(row["minus_method"], y, color=color, marker=marker, markersize=8)
    ax.axvline(0, color="black", linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(points)), [f"{name} minus {row['method']}" for name, row in points])
    ax.invert_yaxis()
    ax.set(xlabel="test loss per token minus the method's own (left is better)")
    save_figure(figure, folder / "variants.png")
