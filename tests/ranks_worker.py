"""One of the processes of tests/test_ranks.py: gradients and a whole run of several methods, on a tiny base.

python tests/ranks_worker.py BASE DATA OUT_DIR DEVICES STRATEGY METHOD...
"""

import importlib
import sys
from pathlib import Path

import torch

from lit_llama.checkpoint import load_model
from lit_llama.common.files import save_tensors, write_json
from lit_llama.data.task import load_task
from lit_llama.devices.blocks import is_shard, shard
from lit_llama.devices.launch import PRECISIONS, launch
from lit_llama.methods.table import METHODS
from lit_llama.settings import Hardware, TrainArgs
from lit_llama.train.evaluate import BeforeAfter
from lit_llama.train.loss import split_by_tokens, sum_gradients, target_loss
from lit_llama.trained import trainable_parameters

ARGUMENTS = {"adapter": dict(prompt_length=4, start_layer=1), "lora": dict(r=3, dropout=0.0), "full": {}}
# Each sample is a micro-batch of its own: 7 of them in a step and 2 in the last one, too few for three ranks. So every
# number of devices computes with the same shapes, which round alike in bfloat16 too.
ARGS = dict(epochs=1, batch_size=7, micro_batch_tokens=60, learning_rate=0.02, eval_every=2)
PRECISIONS["64-true"] = torch.float64


def switch_on(model, method: str, arguments: dict) -> None:
    """Add the method, and move what trains away from where it starts."""
    METHODS[method](model, **arguments)
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in trainable_parameters(model).values():
            tensor += 0.05 * torch.randn(tensor.shape)


def save_gradients(fabric, base: str, data: str, folder: Path, strategy: str, method: str, precision: str) -> None:
    """The loss and the gradients of two steps, on every rank."""
    model = load_model(base, PRECISIONS[precision]).requires_grad_(False)
    torch.manual_seed(5)
    switch_on(model, method, ARGUMENTS[method])
    if strategy == "fsdp":
        shard(fabric, model, PRECISIONS[precision])
        shards = [param for block in model.transformer.h for param in block.parameters() if is_shard(param)]
        held = sum(param.to_local().numel() for param in shards)
        assert len(shards) == 7 * len(model.transformer.h) and held * 2 == sum(param.numel() for param in shards)
    task = load_task(data, base, 512)
    for name, samples in (("even", task.train[:7]), ("uneven", task.train[7:9])):
        loss, n_targets = torch.zeros(()), sum(sample.n_targets for sample in samples)
        for batch in split_by_tokens(samples, ARGS["micro_batch_tokens"], fabric, model):
            part = target_loss(model, batch) / n_targets
            fabric.backward(part)
            loss += part.detach()
        sum_gradients(fabric, model)
        loss = fabric.all_reduce(loss, reduce_op="sum")
        found = {name: tensor.grad for name, tensor in trainable_parameters(model).items()}
        save_tensors(folder / f"{name}-{precision}-{fabric.global_rank}.safetensors", {"loss": loss, **found})
        model.zero_grad()


def run_script(fabric, base: str, data: str, folder: Path, devices: int, strategy: str, method: str) -> None:
    """The method's script in float64, where every rank but the first starts from other values: rank 0's count."""
    script = importlib.import_module(f"finetune.{method}")

    def add(model, **arguments) -> None:
        switch_on(model, method, arguments)
        model.to(torch.float64)
        with torch.no_grad():
            for tensor in trainable_parameters(model).values():
                tensor += fabric.global_rank  # as if another machine had computed it

    setattr(script, f"add_{method}", add)
    script.launch = lambda *_: fabric
    show = BeforeAfter.show

    def show_and_write(answers: BeforeAfter) -> None:
        write_json(folder / f"answers-{fabric.global_rank}.json", answers.answers)
        show(answers)

    BeforeAfter.show = show_and_write
    hardware = Hardware(devices, strategy="auto" if method == "full" else strategy, precision="64-true")
    flags = dict(ARGUMENTS[method], hardware=hardware, train=TrainArgs(**ARGS))
    if method == "adapter":
        flags["prompt_init"] = "normal"
    script.main(**flags, checkpoint_dir=base, data=data, out_dir=str(folder / "run"), eval_samples=1)
    BeforeAfter.show = show


def main(base: str, data: str, out_dir: str, devices: str, strategy: str, *methods: str) -> None:
    fabric = launch(Hardware(int(devices), strategy=strategy))
    for method in methods:
        for precision in ("32-true", "bf16-true"):
            save_gradients(fabric, base, data, Path(out_dir) / method, strategy, method, precision)
        run_script(fabric, base, data, Path(out_dir) / method, int(devices), strategy, method)


if __name__ == "__main__":
    main(*sys.argv[1:])
