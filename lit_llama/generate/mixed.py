"""Several trained folders over one copy of the base: each row of a batch may use another one.

A row may use an adapter, a prefix, a soft prompt, LoRA, or the base alone. One forward pass serves all of them.

        row 0   [ pad  pad | S_0 S_1 S_2 | text .. ]      soft prompt: virtual ids with their own embeddings
        row 1   [ pad | K_0 K_1 K_2 K_3  | text .. ]      prefix: cache slots that its keys and values fill
        row 2   [ pad  pad  pad  pad  pad | text .. ]     adapter, LoRA: added to the row's vectors in the layers

Rotary positions count from the end of the padding, so a row has the same positions as without a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.attention import attention
from lit_llama.common.errors import UserError
from lit_llama.devices.quantize import quantization
from lit_llama.generate.load import load_trained_folder
from lit_llama.methods.adapter import AdapterAttention
from lit_llama.methods.lora import LowRank, target_layers
from lit_llama.methods.prefix import PrefixAttention
from lit_llama.methods.soft_prompt import SoftPromptEmbedding
from lit_llama.model import CausalSelfAttention, LLaMA

MIXABLE = ("adapter", "prefix", "soft_prompt", "lora")
RowsByTask = dict[Path | None, list[int]]  # the rows of the current batch that use a trained folder; None is the base


class MixedAttention(CausalSelfAttention):
    """The base's attention, with the adapters and prefixes of some rows."""

    def __init__(self, attn: CausalSelfAttention, rows: RowsByTask) -> None:
        self.__dict__.update(attn.__dict__)  # adopt the layer: its modules under the same keys, no weight is copied
        self.rows = rows
        self.adapters: dict[Path, tuple[Tensor, Tensor, Tensor]] = {}  # keys, values (1, nkv, K, hs), gates (nh, 1, 1)
        self.prefixes: dict[Path, Tensor] = {}  # (2, nkv, K, hs)

    def attend(self, q, k, v, input_pos=None, mask=None):
        if k.size(2) > 1:  # the prompts, not a single token
            self.write_prefixes(k, v, mask)
        y = super().attend(q, k, v, input_pos, mask)
        for task, (ak, av, gates) in self.adapters.items():
            if rows := self.rows.get(task):
                ak_rows, av_rows = (t.expand(len(rows), -1, -1, -1) for t in (ak, av))
                y[rows] += (gates * attention(q[rows], ak_rows, av_rows)).type_as(y)
        return y

    def write_prefixes(self, k: Tensor, v: Tensor, mask: Tensor) -> None:
        """Put each prefix where its rows have placeholders, right after the padding."""
        first = mask[:, 0, -1].int().argmax(-1)  # (B,): the first slot that the last token sees
        for task, prefix in self.prefixes.items():
            for row in self.rows.get(task, ()):
                slots = slice(int(first[row]), int(first[row]) + prefix.size(2))
                k[row, :, slots], v[row, :, slots] = prefix[0].to(k.dtype), prefix[1].to(v.dtype)


class Mixer:
    """One base, and the additions of several trained folders, for generate_batch."""

    def __init__(self, model: LLaMA) -> None:
        self.model = model
        self.rows: RowsByTask = {}
        self.front: dict[Path | None, list[int]] = {None: []}  # ids before each task's texts
        wte = model.transformer.wte
        model.transformer.wte = SoftPromptEmbedding(wte, wte.weight[:1])  # one unused row, then soft prompts
        for block in model.transformer.h:
            block.attn = MixedAttention(block.attn, self.rows)

    def add(self, folder: Path, checkpoint_dir: Path | str | None = None) -> dict:
        """Take over what ``folder`` learned, and return its method.json. Raises UserError if it cannot be mixed.

        A second base is loaded on the CPU for this, in int8 if the model is, and then freed. The CPU has no nf4: over
        an nf4 base, an adapter's keys and values are those of the full-precision base.
        """
        wte = self.model.transformer.wte
        dtype, device = wte.weight.dtype, wte.weight.device
        kind = "int8" if quantization(self.model) == "int8" else "none"
        trained, method = load_trained_folder(folder, checkpoint_dir, dtype, "cpu", kind)
        if method["method"] not in MIXABLE:
            raise UserError(
                f"{folder} was trained with {method['method']}, which changes the base's own weights or layers; a "
                f"batch can mix {', '.join(MIXABLE)}"
            )
        self.front[folder] = []
        for block, other in zip(self.model.transformer.h, trained.eval().transformer.h, strict=True):
            if isinstance(other.attn, AdapterAttention):
                gates = other.attn.gate_activation(other.attn.gating_factor)
                tensors = (*other.attn.prompt_kv(dtype), gates)
                block.attn.adapters[folder] = tuple(tensor.detach().to(device) for tensor in tensors)
            if isinstance(other.attn, PrefixAttention):
                block.attn.prefixes[folder] = other.attn.prefix.detach().to(device)
                self.front[folder] = [0] * other.attn.prefix.size(2)  # placeholders: their keys are replaced
            for name, (layer, _) in target_layers(other).items():
                if name in getattr(layer, "lora", {}):
                    low_rank: Any = layer.lora[name]
                    hook = self.add_low_rank(folder, low_rank.to(device))
                    target_layers(block)[name][0].register_forward_hook(hook)
        if isinstance(trained.transformer.wte, SoftPromptEmbedding):
            prompts, prompt = wte.soft_prompt, trained.transformer.wte.soft_prompt  # (all K, C) and (K, C)
            first = wte.num_embeddings + len(prompts)
            self.front[folder] = list(range(first, first + len(prompt)))
            wte.soft_prompt = nn.Parameter(torch.cat((prompts, prompt.to(prompts))), requires_grad=False)
        return method

    def add_low_rank(self, task: Path, low_rank: LowRank) -> Callable[..., Tensor]:
        """A hook of a linear layer, which adds a low-rank update to the rows of ``task``."""

        def add(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if rows := self.rows.get(task):
                output[rows, :, low_rank.rows] += low_rank(args[0][rows])
            return output

        return add

    def assign(self, tasks: list[Path | None], prompts: list[list[int]]) -> list[list[int]]:
        """Let row i of the next batch use ``tasks[i]``. Returns the prompts with the ids before them."""
        self.rows.clear()
        for row, task in enumerate(tasks):
            self.rows.setdefault(task, []).append(row)
        return [self.front[task] + prompt for task, prompt in zip(tasks, prompts, strict=True)]
