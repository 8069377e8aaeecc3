"""Finetune with soft prompts: learned vectors in front of the text's own embeddings.

    python finetune/soft_prompt.py
    python finetune/soft_prompt.py --prompt_init text --init_text "Turn the message into JSON."

Paper: https://arxiv.org/abs/2104.08691. What it adds to the model: lit_llama/methods/soft_prompt.py.
"""

from typing import Literal

import torch

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.checkpoint import load_model
from lit_llama.common.errors import UserError
from lit_llama.data.batches import step_indices
from lit_llama.data.task import check_data, load_task
from lit_llama.devices.blocks import shard, unwrap_blocks, wrap_blocks
from lit_llama.devices.launch import base_dtype, launch, print_rank0
from lit_llama.devices.memory import check_memory
from lit_llama.devices.quantize import quantize_base
from lit_llama.methods.soft_prompt import add_soft_prompt, start_from_text, start_normal
from lit_llama.settings import DEFAULT_BASE, Data, DataOptions, Hardware, TrainArgs
from lit_llama.train.evaluate import BeforeAfter, validate
from lit_llama.train.loss import broadcast_trained, check_finite, split_by_tokens, sum_gradients, target_loss
from lit_llama.train.run import Run, default_out_dir, describe_run
from lit_llama.trained import count_trainable, load_initial, trainable_parameters


def main(
    prompt_length: int = 20,
    prompt_init: Literal["text", "vocabulary", "normal"] = "vocabulary",
    init_text: str = "",
    train: TrainArgs = TrainArgs(epochs=1, batch_size=4, learning_rate=1e-2, eval_every=150),
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
    """Finetune a base with soft prompts.

    Args:
        prompt_length: Number of learned vectors (K).
        prompt_init: Start from a "text", from random common tokens of the "vocabulary" (the paper), or "normal".
        init_text: The text of --prompt_init text. Default: the first training sample.
    """
    fresh = not (init_from or resume)
    if init_text and prompt_init != "text" and fresh:
        raise UserError("--init_text needs --prompt_init text")
    out_dir = out_dir or default_out_dir("soft_prompt", data)
    check_data(data)
    ensure_base(checkpoint_dir, yes)  # before launch, where other processes wait for this one
    fabric = launch(hardware, logger, out_dir)

    # Data: token ids, with a target only where the answer is
    task = load_task(data, checkpoint_dir, train.max_seq_length, data_options, n_virtual=prompt_length)
    total_steps = train.total_steps(len(task.train))
    print_rank0(f"{task.summary}\n{train.summary(len(task.train), fabric.world_size)}")

    # Run: the folder that everything is written to
    arguments = dict(prompt_length=prompt_length)
    dtype = base_dtype(hardware.precision, fabric.device)
    settings = describe_run("soft_prompt", add_soft_prompt, arguments, task, train, dtype, hardware.quantize, init_from)
    run = Run(fabric, out_dir, settings, resume, overwrite, allow_changes)

    # Model: freeze the base, then add the method; what requires a gradient afterwards is trained
    model = load_model(checkpoint_dir, dtype, fabric.device, sharded=hardware.strategy == "fsdp")
    model.requires_grad_(False)
    quantize_base(model, hardware.quantize)
    answers = BeforeAfter(fabric, task, eval_samples)
    answers.ask("before", model)
    torch.manual_seed(train.seed)
    add_soft_prompt(model, **arguments)
    if init_from and not resume:
        load_initial(model, init_from)
    if hardware.strategy == "fsdp":
        shard(fabric, model, dtype)
    print_rank0(count_trainable(model))
    if prompt_init == "text" and fresh:
        start_from_text(model, task.tokenizer.encode(init_text) if init_text else task.train[0].ids.tolist())
    elif prompt_init == "normal" and fresh:
        start_normal(model)
    broadcast_trained(fabric, model)
    check_memory(fabric, model, train, task.longest, hardware.checkpointing)
    wrap_blocks(model, hardware.compile, hardware.checkpointing)

    # Optimizer
    optimizer = torch.optim.AdamW(
        trainable_parameters(model).values(), lr=train.learning_rate, weight_decay=train.weight_decay
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
