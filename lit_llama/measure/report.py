"""The figures of a comparison of methods, and their table."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_llama.common.files import read_json
from lit_llama.data.batches import TokenizedSample, collate
from lit_llama.measure.intervals import loss_interval, paired_difference, share_interval
from lit_llama.model import LLaMA
from lit_llama.train.loss import target_loss
from lit_llama.train.run import read_metrics
from lit_llama.trained import read_method


def quality(file: Path) -> dict:
    """Share of right answers and loss per token of what scripts/evaluate.py wrote, with their intervals.

    Plain texts ask nothing: of them there is the loss alone.
    """
    rows = read_json(file)["samples"]
    losses, counts = [row["loss"] for row in rows], [row["n_targets"] for row in rows]
    asked = [row for row in rows if row["right"] is not None]
    right = sum(row["right"] for row in asked)
    figures = {"loss": sum(losses) / sum(counts), "loss_interval": loss_interval(losses, counts), "n_test": len(rows)}
    if asked:
        figures |= {
            "right": right / len(asked),
            "right_interval": share_interval(right, len(asked)),
            "answers": {str(row["row"]): row["right"] for row in asked},
        }
    return figures


def lowest_loss(out_dir: Path) -> float:
    """The lowest validation loss of a run."""
    return min(float(row["val_loss"]) for row in read_metrics(out_dir) if row["val_loss"])


def learning_rate(out_dir: Path) -> float:
    """What a run was trained with."""
    return read_method(out_dir)["train"]["learning_rate"]


def flops_per_token(model: LLaMA, samples: list[TokenizedSample]) -> float:
    """Floating-point operations of matrix products, forward and backward, for each token of these samples."""
    ids, targets, _ = collate(samples, model.transformer.wte.weight.device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused kernels are not counted
        if any(tensor.requires_grad for tensor in model.parameters()):
            target_loss(model.train(), ids, targets).backward()
        else:
            with torch.no_grad():
                model.hidden_states(ids)
    return counter.get_total_flops() / ids.numel()


def markdown(results: dict[str, dict]) -> str:
    """The table. It also compares each method's exact match with full finetuning's on the same samples."""
    header = ["", "trained", "of all", "right, 95 %", "minus full", "loss, 95 %", "training loss", "GFLOP/token"]
    header += ["minutes", "peak MB", "kept MB"]
    rows = [header, ["---"] * len(header)]
    full = results.get("full")
    for name, row in results.items():
        cells = [name]
        if "trained_parameters" in row:
            cells += [f"{row['trained_parameters']:,}", f"{row['trained_share']:.3%}"]
        else:
            cells += ["0", "0 %"]
        if "right" in row:
            cells += [f"{row['right']:.1%} ({spread(row['right_interval'], '.1%')})"]
            cells += [paired(row, full) if full and row is not full else ""]
        else:
            cells += [""] * 2
        cells += [f"{row['loss']:.4f} ({spread(row['loss_interval'], '.4f')})" if "loss" in row else ""]
        cells += [f"{row['train_loss']:.4f}" if "train_loss" in row else ""]
        if "seconds" in row:
            cells += [f"{row['gflop_per_token']:.2f}", f"{row['seconds'] / 60:.1f}"]
            cells += ["" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:,.0f}"]  # untold on Windows
            cells += [f"{row['kept_bytes'] / 1e6:,.2f}"]
        else:
            cells += [""] * 4
        rows.append([cell.replace("%", " %").replace("  %", " %") for cell in cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def spread(interval: tuple[float, float], form: str) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def paired(row: dict, full: dict) -> str:
    """The difference to full finetuning in points, on the samples that both answered."""
    both = [number for number in row["answers"] if number in full["answers"]]
    mean, low, high = paired_difference(*([one["answers"][number] for number in both] for one in (row, full)))
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
