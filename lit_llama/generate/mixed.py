"""Several trained folders over one copy of the base: each row of a batch may use another one.

A row may use an adapter, a prefix, a soft prompt, LoRA, or the base alone. One forward pass serves all of them.

        row 0   [ pad  pad | S_0 S_1 S_2 | text .. ]      soft prompt: virtual ids with their own embeddings
        row 1   [ pad | K_0 K_1 K_2 K_3  | text .. ]      prefix: cache slots that its keys and values fill
        row 2   [ pad  pad  pad  pad  pad | text .. ]     adapter, LoRA: added to the row's vectors in the layers

Rotary positions count from the end of the padding, so a row has the same positions as without a batch.
"""

from __future__ import annotations

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


class Rows:
    """The task of each row of the current batch: a trained folder, or None for the base."""

    def __init__(self) -> None:
        self.tasks: list[Path | None] = []

    def of(self, task: Path) -> list[int]:
        return [row for row, other in enumerate(self.tasks) if other == task]


class MixedAttention(CausalSelfAttention):
    """The base's attention, with the adapters and prefixes of some rows."""

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
            if rows := self.rows.of(task):
                ak_rows, av_rows = (t.expand(len(rows), -1, -1, -1) for t in (ak, av))
                y[rows] += (gates * attention(q[rows], ak_rows, av_rows)).type_as(y)
        return y

    def write_prefixes(self, k: Tensor, v: Tensor, mask: Tensor) -> None:
        """Put each prefix where its rows have placeholders, right after the padding."""
        first = mask[:, 0, -1].int().argmax(-1)  # (B,): the first slot that the last token sees
        for task, prefix in self.prefixes.items():
            for row in self.rows.of(task):
                slots = slice(int(first[row]), int(first[row]) + prefix.size(2))
                k[row, :, slots], v[row, :, slots] = prefix[0].to(k.dtype), prefix[1].to(v.dtype)


class Mixer:
    """One base, and the additions of several trained folders, for generate_batch."""

    def __init__(self, model: LLaMA) -> None:
        self.model, self.rows = model, Rows()
        self.front: dict[Path | None, list[int]] = {None: []}  # ids before each task's texts
        for block in model.transformer.h:
            block.attn = MixedAttention(block.attn, self.rows)

    def add(self, folder: Path, checkpoint_dir: Path | str | None = None) -> dict:
        """Take over what ``folder`` learned, and return its method.json. Raises UserError if it cannot be mixed.

        A second base is loaded on the CPU for this, in int8 if the model is, and then freed. The CPU has no nf4: over
        an nf4 base, an adapter's keys and values are those of the full-precision base.
        """
        folder, wte = Path(folder), self.model.transformer.wte.weight
        kind = "int8" if quantization(self.model) == "int8" else "none"
        trained, method = load_trained_folder(folder, checkpoint_dir, wte.dtype, "cpu", kind)
        if method["method"] not in MIXABLE:
            raise UserError(
                f"{folder} was trained with {method['method']}, which changes the base's own weights or layers; a "
                f"batch can mix {', '.join(MIXABLE)}"
            )
        self.front[folder] = []
        for block, other in zip(self.model.transformer.h, trained.eval().transformer.h, strict=True):
            if isinstance(other.attn, AdapterAttention):
                gates = other.attn.gate_activation(other.attn.gating_factor)
                tensors = (*other.attn.prompt_kv(wte.dtype), gates)
                block.attn.adapters[folder] = tuple(tensor.detach().to(wte.device) for tensor in tensors)
            if isinstance(other.attn, PrefixAttention):
                block.attn.prefixes[folder] = other.attn.prefix.detach().to(wte.device)
                self.front[folder] = [0] * other.attn.prefix.size(2)  # placeholders: their keys are replaced
            for name, (layer, _) in target_layers(other).items():
                if name in getattr(layer, "lora", {}):
                    update: Any = layer.lora[name]
                    updates = self.low_ranks(target_layers(block)[name][0]).setdefault(folder, [])
                    updates.append(update.to(wte.device))
        if isinstance(trained.transformer.wte, SoftPromptEmbedding):
            self.add_soft_prompt(folder, trained.transformer.wte.soft_prompt.detach())
        return method

    def low_ranks(self, layer: Any) -> dict[Path, list[LowRank]]:
        """The low-rank updates of a linear layer by task, which a hook adds to its output."""
        if not hasattr(layer, "low_ranks"):
            layer.low_ranks = {}
            layer.register_forward_hook(self.add_low_ranks)
        return layer.low_ranks

    def add_low_ranks(self, layer: Any, args: tuple, output: Tensor) -> Tensor:
        for task, updates in layer.low_ranks.items():
            rows = self.rows.of(task)
            for update in updates if rows else ():
                delta = torch.zeros_like(output[rows])
                delta[..., update.rows] = update(args[0][rows])
                output[rows] += delta
        return output

    def add_soft_prompt(self, folder: Path, prompt: Tensor) -> None:
        """Append ``prompt`` (K, C) to the soft prompts of all folders, and give its rows virtual ids."""
        wte = self.model.transformer.wte
        before = wte.soft_prompt if isinstance(wte, SoftPromptEmbedding) else wte.weight[:0]
        first = self.model.config.vocab_size + len(before)
        self.front[folder] = list(range(first, first + len(prompt)))
        prompts = torch.cat((before, prompt.to(before)))
        if isinstance(wte, SoftPromptEmbedding):
            wte.soft_prompt = nn.Parameter(prompts, requires_grad=False)
        else:
            self.model.transformer.wte = SoftPromptEmbedding(wte, prompts)

    def assign(self, tasks: list[Path | None], prompts: list[list[int]]) -> list[list[int]]:
        """Let row i of the next batch use ``tasks[i]``. Returns the prompts with the ids before them."""
        self.rows.tasks = tasks
        return [self.front[task] + prompt for task, prompt in zip(tasks, prompts, strict=True)]
