"""Small things that several test files need: a word-level tokenizer and a base folder of a tiny model around it."""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers import decoders, models, pre_tokenizers

from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.cli import parser_of
from lit_llama.files import save_tensors, write_json
from lit_llama.methods import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.trained import describe_base, kept_tensors, trained_tensors

SOME_BASE = {"checkpoint_dir": "base", "name": "tiny", "fingerprint": ""}  # of a method.json whose base is not read
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 3 control tokens and 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(CONTROLS + alphabet)}
    tokenizer = TokenizersTokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROLS)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_base(folder: Path, seed: int = 1, **changes) -> Path:
    """A checkpoint folder with a random tiny model and the tokenizer above."""
    sizes = dict(
        block_size=512, vocab_size=259, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, head_size=8, intermediate_size=48
    )
    torch.manual_seed(seed)
    model = LLaMA(LLaMAConfig(name="tiny", **{**sizes, **changes})).init_weights(0.1)
    folder.mkdir(parents=True)
    state = {k: v for k, v in model.state_dict().items() if not (k == "lm_head.weight" and model.config.tie_embeddings)}
    save_checkpoint(folder, model.config, state.items())
    write_tokenizer(folder)
    return folder


def save_trained(base: Path, folder: Path, method: str, **arguments) -> Path:
    """A trained folder over ``base``, with random values in all that trains."""
    model = load_model(base).requires_grad_(False)
    METHODS[method](model, **arguments)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    save_tensors(folder / "trained.safetensors", kept_tensors(model))
    about = {"base": describe_base(base), "prompt_style": "chatml", "train": {"max_seq_length": 64}}
    write_json(folder / "method.json", {"method": method, "arguments": arguments, **about})
    return folder


def write_rows(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def sums(n: int) -> list[dict]:
    """A toy task with answers of uneven length."""
    return [{"instruction": f"add {i} and {i * i}", "output": str(i + i * i) * (1 + i % 3)} for i in range(n)]


def script_parser(path: Path) -> ArgumentParser:
    """The parser of a script, which is imported but not run."""
    name = f"script_{path.parent.name}_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return parser_of(sys.modules[name].main)
