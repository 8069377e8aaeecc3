"""Draw what runs have written into their metrics.csv: loss, validation loss, learning rate, tokens/s.

    python scripts/plot_runs.py out/adapter/bookings out/lora/bookings
    python scripts/plot_runs.py out/adapter/bookings --out_file curves.png      # while it is running, too

Needs the extra ``plot``: pip install -e ".[plot]"
"""

from pathlib import Path

from lit_llama import cli
from lit_llama.common.errors import UserError
from lit_llama.common.files import check_writable
from lit_llama.measure.plots import plot_runs
from lit_llama.train.run import read_metrics


def main(runs: list[str], out_file: str = "out/runs.png") -> None:
    """Draw the curves of one run, or of several to compare.

    Args:
        out_file: The picture to write: .png, .svg or .pdf.
    """
    if Path(out_file).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out_file {out_file} must end in .png, .svg or .pdf")
    check_writable(out_file)
    metrics = {run: read_metrics(Path(run)) for run in runs}
    if missing := [run for run, rows in metrics.items() if not rows]:
        raise UserError(f"{', '.join(missing)}: no step in a metrics.csv there; give folders that a run wrote")
    plot_runs(Path(out_file), metrics)
    print(f"wrote {out_file}")


if __name__ == "__main__":
    cli.run(main)
