"""One of the processes of tests/test_ranks.py: gradients and a whole run of several methods, on a tiny base.

    python tests/ranks_worker.py BASE DATA OUT_DIR DEVICES STRATEGY METHOD...
"""

import sys
from pathlib import Path

import torch

from lit_llama.checkpoint import load_model
from lit_llama.data import load_task
from lit_llama.devices import launch
from lit_llama.evaluate import Comparison
from lit_llama.files import save_tensors, write_json
from lit_llama.methods import METHODS
from lit_llama.runs import Run
from lit_llama.sharding import is_piece, shard
from lit_llama.train import TrainArgs, fit, step_gradient
from lit_llama.trained import trained_tensors

ARGUMENTS = {"adapter": dict(prompt_length=4, start_layer=1), "lora": dict(r=3, dropout=0.0), "full": {}}
# Each sample is a micro-batch of its own: 7 of them in a step and 2 in the last one, too few for three ranks.
ARGS = dict(epochs=1, batch_size=7, micro_batch_tokens=60, learning_rate=0.02, eval_every=2)


def build(fabric, base: str, method: str, dtype: torch.dtype, strategy: str):
    """The method switched on: what trains is away from where it starts."""
    model = load_model(base, None).requires_grad_(False)
    torch.manual_seed(5)
    METHODS[method](model, **ARGUMENTS[method])
    model.to(dtype)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor += 0.05 * torch.randn(tensor.shape)
    if strategy == "fsdp":
        shard(fabric, model, dtype)
        pieces = [param for block in model.transformer.h for param in block.parameters() if is_piece(param)]
        held = sum(param.to_local().numel() for param in pieces)
        assert len(pieces) == 7 * len(model.transformer.h) and held * 2 == sum(param.numel() for param in pieces)
    return model


def main(base: str, data: str, out_dir: str, devices: str, strategy: str, *methods: str) -> None:
    fabric = launch(int(devices), strategy=strategy)
    task = load_task(data, base, None, 512)
    for method in methods:
        folder = Path(out_dir) / method
        model = build(fabric, base, method, torch.float32, strategy)
        for name, samples in (("even", task.train[:7]), ("uneven", task.train[7:9])):
            loss = step_gradient(fabric, model, samples, ARGS["micro_batch_tokens"])
            found = {name: tensor.grad for name, tensor in trained_tensors(model).items()}
            save_tensors(folder / f"{name}-{fabric.global_rank}.safetensors", {"loss": torch.tensor(loss), **found})
            model.zero_grad()

        model, args = build(fabric, base, method, torch.float64, strategy), TrainArgs(**ARGS)
        comparison = Comparison(fabric, task, n_samples=1)  # with several ranks, all but the first have none
        comparison.answer("before", model)
        write_json(folder / f"answers-{fabric.global_rank}.json", comparison.answers)
        with torch.no_grad():
            for tensor in trained_tensors(model).values():
                tensor += fabric.global_rank  # as if another machine had computed it: fit starts from rank 0's
        optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=args.learning_rate)
        run = Run(fabric, folder / "run", base)
        run.begin(method, ARGUMENTS[method], base, task, args, model, optimizer)
        fit(fabric, model, optimizer, task.train, task.validation, args, run)


if __name__ == "__main__":
    main(*sys.argv[1:])
