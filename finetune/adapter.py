"""Finetune with LLaMA-Adapter: learned prompts in the top blocks behind a gate that starts at zero.

    python finetune/adapter.py                                      # SmolLM2-135M on data/bookings
    python finetune/adapter.py --data my.json --out_dir out/my      # your own data
    python finetune/adapter.py --devices 8                          # eight GPUs

Paper: https://arxiv.org/abs/2303.16199. What it adds to the model: lit_llama/methods/adapter.py.
"""

from pathlib import Path

import torch

from lit_llama import cli
from lit_llama.checkpoint import load_model
from lit_llama.data import load_task
from lit_llama.devices import base_dtype, launch
from lit_llama.download import DEFAULT_BASE, ensure_base
from lit_llama.evaluate import Comparison
from lit_llama.methods.adapter import add_adapter
from lit_llama.runs import Run
from lit_llama.train import TrainArgs, fit


def main(
    checkpoint_dir: str = DEFAULT_BASE,
    data: str = "data/bookings",
    out_dir: str | None = None,
    prompt_length: int = 10,
    start_layer: int = 2,
    gate: str = "head",
    prompt_style: str | None = None,
    # The rate was measured on data/bookings; the paper's is 9e-3 * batch_size / 256.
    train: TrainArgs = TrainArgs(max_steps=450, batch_size=4, learning_rate=1e-2, weight_decay=0.02, eval_every=150),
    eval_samples: int = 200,
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    yes: bool = False,
) -> None:
    """Finetune a base with LLaMA-Adapter.

    Args:
        checkpoint_dir: Folder of the base; the default one is offered for download when it is missing.
        data: A .json, .jsonl, .csv or .txt file, or a folder with train and validation files.
        out_dir: Where the trained folder is written; by default out/adapter/ and the data's name.
        prompt_length: Rows of the learned prompt in each block (K).
        start_layer: The first block that gets a prompt; the ones below stay as they are.
        gate: One gate for each "head", as in the paper, or for each "layer", as in PEFT.
        prompt_style: alpaca, chatml, llama2, llama3 or plain; by default what the base's tokenizer tells.
        train: The settings that every finetune script shares.
        eval_samples: Held-out samples that are answered before and after training; 0 for none.
        devices: Processes, one for each device, on every node.
        num_nodes: Machines.
        strategy: Fabric's strategy.
        precision: Width of the base's weights: bf16-true, 32-true, or auto for the faster one.
        resume: Go on with the run that out_dir holds.
        overwrite: Start anew in an out_dir that holds a run.
        yes: Do not ask before a download.
    """
    ensure_base(checkpoint_dir, yes)
    fabric = launch(devices, num_nodes, strategy)
    run = Run(fabric, out_dir or f"out/adapter/{Path(data).stem}", resume, overwrite)
    task = load_task(data, checkpoint_dir, prompt_style, train.max_seq_length)
    fabric.print(task.summary)

    torch.manual_seed(train.seed)
    model = load_model(checkpoint_dir, base_dtype(precision, fabric.device), fabric.device)
    model.requires_grad_(False)
    arguments = dict(prompt_length=prompt_length, start_layer=start_layer, gate=gate)
    add_adapter(model, **arguments)

    adapted = model.transformer.h[start_layer:]
    prompts = [block.attn.adapter_wte.weight for block in adapted]
    gates = [block.attn.gating_factor for block in adapted]
    optimizer = torch.optim.AdamW(
        [{"params": prompts, "weight_decay": train.weight_decay}, {"params": gates, "weight_decay": 0.0}],
        lr=train.learning_rate,
        betas=(0.9, 0.95),
    )
    comparison = Comparison(fabric, task, eval_samples)
    comparison.answer("before", model)
    run.begin("adapter", arguments, checkpoint_dir, task, train, model)
    fit(fabric, model, optimizer, task.train, task.validation, train, run)
    comparison.answer("after", model)
    comparison.show()
    fabric.print(
        f'\nsaved in {run.out_dir}; try: python generate/adapter.py --trained_dir {run.out_dir} --prompt "..."'
    )


if __name__ == "__main__":
    cli.run(main)
