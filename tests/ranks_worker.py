"""One of the processes of tests/test_ranks.py: whole runs of several methods in float64, on a tiny base.

python tests/ranks_worker.py FOLDER OUT_DIR DEVICES STRATEGY METHOD...
"""

import importlib
import sys
from pathlib import Path

import torch
from helpers import CASES, finetune

from lit_llama.common.files import write_json
from lit_llama.devices import blocks
from lit_llama.devices.launch import PRECISIONS, launch
from lit_llama.settings import Hardware
from lit_llama.train.evaluate import BeforeAfter
from lit_llama.trained import trainable_parameters

# Each sample is a micro-batch of its own: 7 of them in a step and 2 in the last one, too few for three ranks.
TRAIN = dict(epochs=1, max_steps=None, batch_size=7, micro_batch_tokens=60, eval_every=2)
PRECISIONS["64-true"] = torch.float64


def shard(fabric, model, dtype) -> None:
    """With a look at what this rank holds: half of each frozen tensor in a block."""
    blocks.shard(fabric, model, dtype)
    shards = [param for block in model.transformer.h for param in block.parameters() if blocks.is_shard(param)]
    held = sum(param.to_local().numel() for param in shards)
    assert len(shards) == 7 * len(model.transformer.h) and held * 2 == sum(param.numel() for param in shards)


def run_script(fabric, folder: Path, out_dir: Path, devices: int, strategy: str, method: str) -> None:
    """The method's script, where every rank but the first starts from other values: rank 0's count."""
    script = importlib.import_module(f"finetune.{method}")
    add = getattr(script, f"add_{method}")

    def add_and_move(model, **arguments) -> None:
        add(model, **arguments)
        model.to(torch.float64)
        torch.manual_seed(5)
        with torch.no_grad():
            for tensor in trainable_parameters(model).values():  # away from where it starts, and as on another machine
                tensor += 0.05 * torch.randn(tensor.shape) + fabric.global_rank

    setattr(script, f"add_{method}", add_and_move)
    script.launch, script.shard = lambda *_: fabric, shard
    BeforeAfter.show = lambda answers: write_json(out_dir / f"answers-{fabric.global_rank}.json", answers.answers)
    flags = dict(CASES[method][1], devices=devices, precision="64-true", eval_samples=1)
    if method != "full":
        flags["strategy"] = strategy
    finetune(folder, out_dir / "run", method, **flags, **TRAIN)


def main(folder: str, out_dir: str, devices: str, strategy: str, *methods: str) -> None:
    fabric = launch(Hardware(int(devices), strategy=strategy))
    for method in methods:
        run_script(fabric, Path(folder), Path(out_dir) / method, int(devices), strategy, method)


if __name__ == "__main__":
    main(*sys.argv[1:])
