"""Several trained folders over one copy of the base, each row of a batch with its own.

A row may use an adapter, a prefix, a soft prompt, LoRA, or the base alone; one forward pass serves all of them.

        row 0   [ pad  pad | S_0 S_1 S_2 | text .. ]      soft prompt: virtual ids, embeddings of its own
        row 1   [ pad | K_0 K_1 K_2 K_3  | text .. ]      prefix: slots of the cache that its keys and values fill
        row 2   [ pad  pad  pad  pad  pad | text .. ]     adapter, LoRA: what is added for the row, on the way

A prefix and a soft prompt stand in front of the text in the cache, so the slots' distance from the padding gives every
row the rotary positions that it has alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.cli import UserError
from lit_llama.devices.quantize import quantization
from lit_llama.generate.load import load_trained_folder
from lit_llama.methods.adapter import AdapterAttention
from lit_llama.methods.lora import places
from lit_llama.methods.prefix import PrefixAttention
from lit_llama.methods.soft_prompt import SoftPromptEmbedding
from lit_llama.model import CausalSelfAttention, LLaMA, attention

MIXABLE = ("adapter", "prefix", "soft_prompt", "lora")


class Rows:
    """Which task each row of the current batch belongs to; None is the base alone."""

    def __init__(self) -> None:
        self.tasks: list[Path | None] = []

    def of(self, task: Path | None) -> list[int]:
        return [row for row, other in enumerate(self.tasks) if other == task]


class MixedAttention(CausalSelfAttention):
    """The base's attention; for the rows of an adapter or a prefix, what those add."""

    def __init__(self, attn: CausalSelfAttention, rows: Rows) -> None:
        self.__dict__.update(attn.__dict__)  # adopt the layer: its modules under the same keys, no weight is copied
        self.rows = rows
        self.adapters: dict[Path, tuple[Tensor, Tensor, Tensor]] = {}  # keys, values (1, nkv, K, hs), gates (nh, 1, 1)
        self.prefixes: dict[Path, Tensor] = {}  # (2, nkv, K, hs)

    def attend(self, q, k, v, input_pos=None, mask=None):
        if k.size(2) > 1:  # the prompts, not a single token
            self.write_prefixes(k, v, mask)
        y = super().attend(q, k, v, input_pos, mask)
        for task, (ak, av, gates) in self.adapters.items():
            mine = self.rows.of(task)
            if mine:
                ak_rows, av_rows = (t.expand(len(mine), -1, -1, -1) for t in (ak, av))
                y[mine] += (gates * attention(q[mine], ak_rows, av_rows)).type_as(y)
        return y

    def write_prefixes(self, k: Tensor, v: Tensor, mask: Tensor) -> None:
        """Put each prefix where its rows' placeholders are: right after the padding."""
        first = mask[:, 0, -1].int().argmax(-1)  # (B,): the first slot that the last token sees
        for task, prefix in self.prefixes.items():
            for row in self.rows.of(task):
                slots = slice(int(first[row]), int(first[row]) + prefix.size(2))
                k[row, :, slots], v[row, :, slots] = prefix[0].to(k.dtype), prefix[1].to(v.dtype)


class MixedLowRank(nn.Module):
    """The low-rank additions of several tasks to one linear layer."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.tasks: dict[Path, nn.ModuleDict] = {}

    def forward(self, layer: nn.Linear, args: tuple, output: Tensor) -> Tensor:
        for task, pairs in self.tasks.items():
            mine = self.rows.of(task)
            for pair in pairs.values() if mine else ():
                delta = torch.zeros_like(output[mine])
                delta[..., pair.rows] = pair(args[0][mine])
                output[mine] += delta
        return output


class Mixer:
    """One base and what several trained folders add to it, for generate_batch."""

    def __init__(self, model: LLaMA) -> None:
        self.model, self.rows = model, Rows()
        self.front: dict[Path | None, list[int]] = {None: []}  # ids in front of each task's texts
        for block in model.transformer.h:
            block.attn = MixedAttention(block.attn, self.rows)
        self.prompts = model.transformer.wte.weight.new_zeros(0, model.config.n_embd)  # all soft prompts in a row

    def add(self, folder: Path, checkpoint_dir: Path | None = None) -> dict:
        """Take over what ``folder`` learned; returns its method.json. Its base is checked, and not kept.

        It is loaded beside the base on the CPU: mapped where the base is wide, over an int8 copy where that is int8. Of
        nf4 the CPU has none: over it, the keys and values of an adapter's prompt are those of the wide base.
        """
        folder, wte = Path(folder), self.model.transformer.wte.weight
        narrow = "int8" if quantization(self.model) == "int8" else "none"
        trained, method = load_trained_folder(folder, checkpoint_dir, wte.dtype, "cpu", narrow)
        if method["method"] not in MIXABLE:
            raise UserError(
                f"{folder} was trained with {method['method']}, which changes the base's own weights or layers; a "
                f"batch can mix {', '.join(MIXABLE)}"
            )
        self.front[folder] = []
        for block, other in zip(self.model.transformer.h, trained.eval().transformer.h, strict=True):
            if isinstance(other.attn, AdapterAttention):
                gates = other.attn.gate_activation(other.attn.gating_factor).detach()
                block.attn.adapters[folder] = tuple(
                    t.detach().to(wte.device) for t in (*other.attn.prompt_kv(wte.dtype), gates)
                )
            if isinstance(other.attn, PrefixAttention):
                block.attn.prefixes[folder] = other.attn.prefix.detach().to(wte.device)
                self.front[folder] = [0] * other.attn.prefix.size(2)  # placeholders: their keys are replaced
            for name, (layer, _) in places(other).items():
                if name in getattr(layer, "lora", {}):
                    mixed = self.low_ranks(places(block)[name][0])
                    mixed.tasks.setdefault(folder, nn.ModuleDict())[name] = layer.lora[name].to(wte.device)
        if isinstance(trained.transformer.wte, SoftPromptEmbedding):
            self.add_soft_prompt(folder, trained.transformer.wte.soft_prompt.detach())
        return method

    def low_ranks(self, layer: Any) -> MixedLowRank:
        if not hasattr(layer, "mixed"):
            layer.mixed = MixedLowRank(self.rows)
            layer.register_forward_hook(lambda layer, args, output: layer.mixed(layer, args, output))
        return layer.mixed

    def add_soft_prompt(self, folder: Path, prompt: Tensor) -> None:
        first = self.model.config.vocab_size + len(self.prompts)
        self.front[folder] = list(range(first, first + len(prompt)))
        self.prompts = torch.cat((self.prompts, prompt.to(self.prompts)))
        wte = self.model.transformer.wte
        if isinstance(wte, SoftPromptEmbedding):
            wte.soft_prompt = nn.Parameter(self.prompts, requires_grad=False)
        else:
            self.model.transformer.wte = SoftPromptEmbedding(wte, self.prompts)

    def assign(self, tasks: list[Path | None], prompts: list[list[int]]) -> list[list[int]]:
        """Make row i of the next batch one of ``tasks[i]``; the prompts with what stands in front of them."""
        self.rows.tasks = tasks
        return [self.front[task] + prompt for task, prompt in zip(tasks, prompts, strict=True)]
