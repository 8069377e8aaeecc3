"""What scripts/benchmark.py measures: this project, LitGPT and PEFT doing the same work, each in its own process.

A case takes training steps on given samples, or decodes token by token. Weights are random, as speed does not depend on
them. All cases have the same shapes.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_llama.checkpoint import CONFIG_FILE, load_config
from lit_llama.common.errors import UserError
from lit_llama.configs import CONFIGS
from lit_llama.data.batches import IGNORE, TokenizedSample, micro_batches
from lit_llama.devices.blocks import wrap_blocks
from lit_llama.devices.inference import NextLogits, prepare_for_inference
from lit_llama.devices.launch import PRECISIONS, default_device
from lit_llama.devices.memory import peak_memory
from lit_llama.devices.quantize import quantize_base
from lit_llama.formats.export import llama_config
from lit_llama.generate.stream import generate
from lit_llama.methods.table import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.train.loss import target_loss
from lit_llama.trained import trainable_parameters


def config_of(model: str) -> LLaMAConfig:
    """The config of a released model (lit_llama/configs.py) or of the base in a folder."""
    if model not in CONFIGS and not (Path(model) / CONFIG_FILE).exists():
        raise UserError(f"--model {model} is neither a folder with a base nor one of {', '.join(CONFIGS)}")
    return LLaMAConfig.from_name(model) if model in CONFIGS else load_config(model)


@dataclass
class BenchmarkCase:
    """One line of the benchmark. ``project`` is "ours", "litgpt" or "peft"; ``options`` may be ("compile", "int8").

    Our micro-batches hold ``micro_batch_tokens``, the others' ``micro_batch_samples`` padded to the longest.
    """

    project: str
    model: str
    method: str
    precision: str
    options: tuple[str, ...] = ()
    micro_batch_tokens: int = 1024
    micro_batch_samples: int = 4

    @property
    def config(self) -> LLaMAConfig:
        return config_of(self.model)

    @property
    def name(self) -> str:
        return " ".join([self.project, self.method, self.precision, *self.options])

    @contextmanager
    def tensors(self, device: torch.device) -> Iterator[None]:
        """Make all tensors in the base's precision on the device. A 7B in float32 does not fit on many."""
        torch.set_default_dtype(PRECISIONS[self.precision])
        try:
            with device:
                yield
        finally:
            torch.set_default_dtype(torch.float32)


# A step takes samples and returns the tokens it computed, padding included; decode takes a prompt and a count.
Step = Callable[[list[TokenizedSample]], int]
Decode = Callable[[list[int], int], int]
run_case: Step | Decode  # set by ``build``


def build(case: BenchmarkCase, kind: str, threads: int) -> None:
    """Build a case in this process, for ``measured``."""
    global run_case
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    project = {"ours": build_ours, "litgpt": build_litgpt, "peft": build_peft}[case.project]
    run_case = project(case, kind, default_device())


def measured(*arguments: Any) -> tuple[float, int, int | None]:
    """Do some work. Returns seconds, computed tokens, and the peak memory of this process."""
    started = time.perf_counter()
    computed = run_case(*arguments)
    synchronize()
    return time.perf_counter() - started, computed, peak_memory(default_device())


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


# ---------------------------------------------------------------------------------------------- ours


def build_ours(case: BenchmarkCase, kind: str, device: torch.device) -> Step | Decode:
    options = set(case.options)
    with case.tensors(device):
        model = LLaMA(case.config).init_weights()
    quantize_base(model, "int8" if "int8" in options else "nf4" if "nf4" in options else "none")
    model.requires_grad_(False)
    METHODS[case.method](model)
    open_gates(model)
    if kind == "decode":
        prepare_for_inference(model, compile="compile" in options)
        return lambda prompt, n: sum(1 for _ in generate(model, prompt, n, set(), next_logits=NextLogits(model)))
    wrap_blocks(model, compile="compile" in options, checkpointing="checkpointing" in options)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-3)

    def step(samples: list[TokenizedSample]) -> int:
        computed, n_targets = 0, sum(sample.n_targets for sample in samples)
        for batch in micro_batches(samples, case.micro_batch_tokens):
            computed += sum(len(sample.ids) for sample in batch)  # without the padding that rounding adds
            (target_loss(model, batch) / n_targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return computed

    return step


def open_gates(model: torch.nn.Module) -> None:
    """Gates at zero leave the prompts without a gradient: open them, as they are after a few steps."""
    for name, param in model.named_parameters():
        if name.endswith(("gating_factor", "adaption_gate")) and param.requires_grad:  # the latter is PEFT's
            torch.nn.init.constant_(param, 0.1)


# ---------------------------------------------------------------------------------------------- the others


def padded_steps(
    case: BenchmarkCase, model: torch.nn.Module, device: torch.device, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Step:
    """Steps as the other projects take them: samples in order, and each micro-batch's loss the mean of its tokens."""
    size = case.micro_batch_samples
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(samples: list[TokenizedSample]) -> int:
        computed = 0
        batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        for batch in batches:
            ids = pad_sequence([torch.tensor(sample.ids) for sample in batch], True).to(device, torch.long)  # (B, T)
            targets = pad_sequence([torch.tensor(sample.targets) for sample in batch], True, IGNORE).to(ids)
            computed += ids.numel()
            (loss_of(ids, targets) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return computed

    return step


def build_litgpt(case: BenchmarkCase, kind: str, device: torch.device) -> Step | Decode:
    """LitGPT's own modules, its chunked head and loss, and its decoding loop."""
    module = importlib.import_module(f"litgpt.{case.method}")
    lora = dict(lora_r=8, lora_alpha=16, lora_dropout=0.05, lora_query=True, lora_value=True)
    names = {"smollm2-135m": "SmolLM2-135M", "smollm2-360m": "SmolLM2-360M", "Llama-2-7b": "Llama-2-7b-hf"}
    name = names.get(case.model, case.model)
    config = module.Config.from_name(name, **(lora if case.method == "lora" else {}))  # ValueError without such a name
    with case.tensors(device):
        model = module.GPT(config)
    getattr(module, f"mark_only_{case.method}_as_trainable")(model)
    open_gates(model)
    if kind == "decode":
        from litgpt.generate.base import generate as litgpt_generate

        def decode(prompt: list[int], count: int) -> int:
            model.eval()
            with torch.inference_mode():
                model.max_seq_length = len(prompt) + count
                model.set_kv_cache(1, device=device)
                ids = torch.tensor(prompt, device=device)
                return len(litgpt_generate(model, ids, len(prompt) + count, temperature=0.0)) - len(prompt)

        return decode
    from litgpt.utils import chunked_cross_entropy

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        for block in model.transformer.h:  # the prompts' cached keys would have no graph in the second pass
            if hasattr(block.attn, "adapter_kv_cache"):
                block.attn.adapter_kv_cache = None
        return chunked_cross_entropy(model(ids, lm_head_chunk_size=128), targets)

    return padded_steps(case, model, device, loss_of)


def build_peft(case: BenchmarkCase, kind: str, device: torch.device) -> Step | Decode:
    """PEFT's AdaptionPrompt or LoRA over transformers' LlamaForCausalLM, SDPA attention."""
    from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with case.tensors(device):
        base: Any = LlamaForCausalLM(LlamaConfig.from_dict(llama_config(case.config)))
    adapter = AdaptionPromptConfig(adapter_len=10, adapter_layers=case.config.n_layer - 2, task_type="CAUSAL_LM")
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, adapter if case.method == "adapter" else lora)
    open_gates(model)
    if kind == "decode":

        def decode(prompt: list[int], count: int) -> int:
            model.eval()
            ids = torch.tensor([prompt], device=device)
            lengths = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
            return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **lengths).size(1) - len(prompt)

        return decode

    def loss_of(ids: Tensor, targets: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    return padded_steps(case, model, device, loss_of)
