"""Finetune with LLaMA-Adapter: learned prompts in the top blocks behind a gate that starts at zero.

    python finetune/adapter.py                                      # SmolLM2-135M on data/bookings
    python finetune/adapter.py --data my.json --out_dir out/my      # your own data
    python finetune/adapter.py --devices 8 --train.batch_size 64    # eight GPUs (not tried yet)

Paper: https://arxiv.org/abs/2303.16199. What it adds to the model: lit_llama/methods/adapter.py.
"""

from typing import Literal

import torch

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.checkpoint import load_model
from lit_llama.common.errors import UserError, check_range
from lit_llama.data.batches import step_indices
from lit_llama.data.task import check_data, load_task
from lit_llama.devices.blocks import shard, unwrap_blocks, wrap_blocks
from lit_llama.devices.launch import base_dtype, launch, print_rank0
from lit_llama.devices.memory import check_memory
from lit_llama.devices.quantize import quantize_base
from lit_llama.methods.adapter import add_adapter, start_from_text
from lit_llama.settings import DEFAULT_BASE, Data, DataOptions, Hardware, TrainArgs
from lit_llama.train.evaluate import BeforeAfter, validate
from lit_llama.train.loss import broadcast_trained, check_finite, split_by_tokens, sum_gradients, target_loss
from lit_llama.train.run import Run, default_out_dir, describe_run
from lit_llama.trained import count_trainable, load_initial, trainable_parameters


def main(
    prompt_length: int = 10,
    start_layer: int = 2,
    prompt_init: Literal["text", "normal"] = "text",
    gate: Literal["head", "layer"] = "head",
    gate_init: float = 0.0,
    gate_lr_scale: float = 0.25,  # at the full rate, gates run ahead of what the prompts have learned
    # On data/bookings, 450 steps end at a validation loss of 0.0340 with 1e-2, and of 0.0403 with 1.4e-2. The paper
    # has one rate for prompts and gates, 9e-3 * batch_size / 256.
    train: TrainArgs = TrainArgs(epochs=0.5, batch_size=2, learning_rate=1e-2, weight_decay=0.02, eval_every=150),
    data: Data = "data/bookings",
    data_options: DataOptions = DataOptions(),  # --columns, --val_fraction, --prompt_style, ... (settings.py)
    checkpoint_dir: str = DEFAULT_BASE,
    out_dir: str | None = None,
    init_from: str | None = None,
    eval_samples: int = 200,
    hardware: Hardware = Hardware(),  # --devices, --strategy, --precision, --quantize, ... (settings.py)
    logger: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    yes: bool = False,
) -> None:
    """Finetune a base with LLaMA-Adapter.

    Args:
        prompt_length: Length of the learned prompt in each block (K).
        start_layer: The first block that gets a prompt; the blocks below do not change.
        prompt_init: Start the prompts from a training "text", or from N(0, 1) with "normal", as in the paper.
        gate: One gate per "head", as in the paper, or per "layer", as in PEFT.
        gate_init: Initial value of the gates. With the paper's 0 the model starts as the base.
        gate_lr_scale: Learning rate of the gates, relative to --train.learning_rate.
    """
    check_range("--gate_lr_scale", gate_lr_scale, 0, 100)
    fresh = not (init_from or resume)
    if prompt_init == "text" and gate_init and fresh:
        raise UserError("--prompt_init text reads the unchanged base: pass --gate_init 0, or --prompt_init normal")
    out_dir = out_dir or default_out_dir("adapter", data)
    check_data(data)
    ensure_base(checkpoint_dir, yes)  # before launch, where other processes wait for this one
    fabric = launch(hardware, logger, out_dir)

    # Data: token ids, with a target only where the answer is
    task = load_task(data, checkpoint_dir, train.max_seq_length, data_options)
    total_steps = train.total_steps(len(task.train))
    print_rank0(f"{task.summary}\n{train.summary(len(task.train), fabric.world_size)}")

    # Run: the folder that everything is written to
    arguments = dict(prompt_length=prompt_length, start_layer=start_layer, gate=gate, gate_init=gate_init)
    dtype = base_dtype(hardware.precision, fabric.device)
    settings = describe_run("adapter", add_adapter, arguments, task, train, dtype, hardware.quantize, init_from)
    settings["gate_lr_scale"] = gate_lr_scale  # so that --resume compares it
    run = Run(fabric, out_dir, settings, resume, overwrite, allow_changes)

    # Model: freeze the base, then add the method; what requires a gradient afterwards is trained
    model = load_model(checkpoint_dir, dtype, fabric.device, sharded=hardware.strategy == "fsdp")
    model.requires_grad_(False)
    quantize_base(model, hardware.quantize)
    answers = BeforeAfter(fabric, task, eval_samples)
    answers.ask("before", model)
    torch.manual_seed(train.seed)
    add_adapter(model, **arguments)
    if init_from and not resume:
        load_initial(model, init_from)
    if hardware.strategy == "fsdp":
        shard(fabric, model, dtype)
    print_rank0(count_trainable(model))
    if prompt_init == "text" and fresh:
        start_from_text(model, task.train[0].ids.tolist())
    broadcast_trained(fabric, model)
    check_memory(fabric, model, train, task.longest, hardware.checkpointing)
    wrap_blocks(model, hardware.compile, hardware.checkpointing)

    # Optimizer: no weight decay on the gates, and a lower learning rate
    trainable = trainable_parameters(model)
    gates = [param for name, param in trainable.items() if name.endswith("gating_factor")]
    prompts = [param for name, param in trainable.items() if not name.endswith("gating_factor")]
    optimizer = torch.optim.AdamW(
        [
            {"params": prompts, "weight_decay": train.weight_decay},
            {"params": gates, "weight_decay": 0.0, "lr_scale": gate_lr_scale},
        ],
        lr=train.learning_rate,
        betas=(0.9, 0.95),  # as in the authors' training
    )

    # Loop: run.steps loads the saved state with --resume and saves it every save_every steps; on Ctrl-C it finishes
    # the step, saves and stops
    model.train()
    for step in run.steps(model, optimizer, total_steps, train.save_every):
        batch = [task.train[i] for i in step_indices(step, train.batch_size, len(task.train), train.seed, train.epochs)]
        n_targets = sum(sample.n_targets for sample in batch)  # on all devices

        loss = torch.zeros((), device=fabric.device)
        for micro_batch in split_by_tokens(batch, train.micro_batch_tokens, fabric, model):  # this device's part
            micro_loss = target_loss(model, micro_batch) / n_targets
            micro_loss.backward()
            loss += micro_loss.detach()
        sum_gradients(fabric, model)
        loss = fabric.all_reduce(loss, reduce_op="sum")  # for the log

        lr = train.learning_rate_at(step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        norm = torch.nn.utils.clip_grad_norm_(trainable_parameters(model).values(), train.clip or float("inf"))
        mean_loss, grad_norm = check_finite(loss, norm, step, batch)  # here a step waits for the device
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        run.log(step, loss=mean_loss, lr=lr, grad_norm=grad_norm, tokens=sum(len(sample.ids) for sample in batch))
        if (step + 1) % train.eval_every == 0 or step + 1 == total_steps:
            run.keep_best(model, validate(fabric, model, task.validation, train.micro_batch_tokens))
            if train.patience and step + 1 - run.best_step >= train.patience * train.eval_every:
                break

    # The model at its best validated step, and what it answers
    run.load_best(model)
    unwrap_blocks(model)
    answers.ask("after", model)
    answers.show()
    print_rank0(f'\nsaved in {out_dir}; try: python generate/adapter.py --trained_dir {out_dir} --prompt "..."')


if __name__ == "__main__":
    cli.run(main)
