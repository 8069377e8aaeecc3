"""Shared by the tests: tiny bases, models and tokenizers; functions that run a script and read what it wrote."""

import functools
import importlib.util
import io
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
import sentencepiece
import torch
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lit_llama.checkpoint import load_model
from lit_llama.cli import parser_of
from lit_llama.common.errors import UserError
from lit_llama.common.files import save_tensors, write_json
from lit_llama.configs import LLAMA_31_SCALING
from lit_llama.data.batches import TokenizedSample
from lit_llama.data.prompts import CHATML
from lit_llama.devices.quantize import quantize_base
from lit_llama.formats.export import exported_tensors, llama_config
from lit_llama.formats.shards import save_checkpoint
from lit_llama.methods.lora import TARGETS
from lit_llama.methods.table import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.settings import DataOptions, Hardware, TrainArgs
from lit_llama.train.loss import target_loss
from lit_llama.train.run import read_metrics as metrics
from lit_llama.trained import describe_base, kept_tensors, trainable_parameters

ROOT = Path(__file__).parent.parent
SCRIPTS = [path for name in ("finetune", "generate", "scripts", "data") for path in sorted((ROOT / name).glob("*.py"))]
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
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_base(folder: Path, seed: int = 1, **changes) -> Path:
    """A checkpoint folder with a random tiny model and the tokenizer above."""
    sizes = dict(
        block_size=512, vocab_size=259, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, head_size=8, intermediate_size=48
    )
    torch.manual_seed(seed)
    model = LLaMA(LLaMAConfig(name="tiny", **{**sizes, **changes})).init_weights(0.1)
    if model.config.bias:
        torch.nn.init.zeros_(model.lm_head.bias)  # no other project's LLaMA has one
    folder.mkdir(parents=True)
    state = {k: v for k, v in model.state_dict().items() if not (k == "lm_head.weight" and model.config.tie_embeddings)}
    save_checkpoint(folder, model.config, state.items())
    write_tokenizer(folder)
    return folder


def save_trained(base: Path, folder: Path, method: str, **arguments) -> Path:
    """A trained folder over the base, with random values in all that trains."""
    model = load_model(base).requires_grad_(False)
    torch.manual_seed(1)
    METHODS[method](model, **arguments)
    shake(model)
    save_tensors(folder / "trained.safetensors", kept_tensors(model))
    about = {"base": describe_base(base), "prompt_style": "template", "train": {"max_seq_length": 64}}
    write_json(folder / "method.json", {"method": method, "arguments": arguments, **about})
    return folder


def files(folder: Path) -> dict[Path, bytes | None]:
    """What lies in a folder, to compare with what lies there later. Folders have no content, and locks do not count."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if path.name != ".lock"}


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


# ------------------------------------------------------ A tiny model, and the same in transformers

TINY = dict(
    block_size=64, vocab_size=97, n_layer=3, n_head=6, n_kv_head=2, n_embd=48, head_size=8, intermediate_size=80
)
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def tiny_model(**changes) -> LLaMA:
    torch.manual_seed(1)
    return LLaMA(LLaMAConfig(**{**TINY, **changes})).init_weights(std=0.2)


def transformers_model(model: LLaMA) -> LlamaForCausalLM:
    """The same model in transformers."""
    theirs = LlamaForCausalLM(LlamaConfig.from_dict(llama_config(model.config)))
    theirs.load_state_dict({"lm_head.weight": model.lm_head.weight, **dict(exported_tensors(model, "hf"))})
    return theirs.eval()


# ---------------------------------------------------------------------- A tiny model with a method


CASES = {
    "full": ("full", dict()),
    "output_layers": ("output_layers", dict(n_blocks=1)),
    "soft_prompt": ("soft_prompt", dict(prompt_length=4)),
    "prefix": ("prefix", dict(prompt_length=4)),
    "prefix by an MLP": ("prefix", dict(prompt_length=4, mlp_size=6)),
    "houlsby": ("houlsby", dict(bottleneck_size=5)),
    "adapter": ("adapter", dict(prompt_length=5, start_layer=1)),
    "adapter_v2": ("adapter_v2", dict(prompt_length=5, start_layer=1)),
    "lora": ("lora", dict(r=3, dropout=0.0)),
    "lora on all": ("lora", dict(r=3, alpha=5.0, dropout=0.0, targets=TARGETS)),
}
every_case = pytest.mark.parametrize("case", CASES)


def tuned(case: str, on: bool = True, dtype=torch.float32, quantize: str = "none", **changes) -> LLaMA:
    """A tiny frozen model with the method; with ``on`` all that trains is away from where it starts."""
    method, arguments = CASES[case]
    model = tiny_model(**changes).to(dtype)
    quantize_base(model, quantize)
    model.requires_grad_(False)
    METHODS[method](model, **arguments)
    if on:
        shake(model)
    return model


def shake(model: LLaMA) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in trainable_parameters(model).values():
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)


def tokens(batch=2, length=11) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(3))


def to_samples(ids: torch.Tensor, targets: torch.Tensor, lengths: list[int] | None = None) -> list[TokenizedSample]:
    """The rows of ids and targets (B, T), cut to their ``lengths``."""
    rows = zip(ids.tolist(), targets.tolist(), lengths or [ids.size(1)] * len(ids), strict=True)
    return [TokenizedSample(array("i", row[:n]), array("i", target[:n])) for row, target, n in rows]


def logits_of(model: LLaMA, ids: torch.Tensor) -> torch.Tensor:
    """With what the method puts in front of the text, and without the logits there."""
    virtual = torch.tensor([model.virtual_ids], dtype=torch.long).expand(len(ids), -1)
    return model(torch.cat((virtual, ids), 1))[:, virtual.size(1) :]


@torch.no_grad()
def greedy(model: LLaMA, prompt: list[int], n: int) -> list[int]:
    """An answer of ``n`` tokens, each the argmax of a forward pass over all before it."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(logits_of(model, torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def saved_bytes(model: LLaMA, samples: list[TokenizedSample]) -> int:
    """What a training step keeps for its backward pass, besides the weights."""
    weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert target_loss(model.train(), samples).requires_grad
    return sum(saved.values())


def naive_attention(q, k, v, mask=None, is_causal=False) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    if is_causal:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
    scores = q @ k.transpose(2, 3) / q.size(3) ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


def train_steps(model: LLaMA, steps: int, targets: torch.Tensor | None = None) -> list[float]:
    """The losses; ``targets`` are the next tokens unless they are given."""
    samples = to_samples(tokens(), tokens().roll(-1, 1) if targets is None else targets)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = target_loss(model, samples)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_cached_decoding(model: LLaMA) -> None:
    """Chunks of several lengths, and one token at a time, give the logits of the full forward pass, in float64."""
    ids = torch.cat((torch.tensor([model.virtual_ids] * 2, dtype=torch.long), tokens()), 1)
    with torch.no_grad():
        full = model(ids)
        for ends in ([0, 4, 5, 9, ids.size(1)], list(range(ids.size(1) + 1))):
            model.set_kv_cache(2, 20)
            parts = [model(ids[:, a:b], torch.arange(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
            torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-9, rtol=1e-9)


def equal_to(theirs, model: LLaMA, base: LLaMA) -> None:
    """The same logits as ``theirs``, and others than the base's."""
    idx = torch.randint(0, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = logits_of(model.eval(), idx)
        expected = theirs.eval()(idx).logits[:, -idx.size(1) :]  # PEFT's prompt tuning has some on its prompt, too
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        assert (ours - base(idx)).abs().max() > 0.01


# ----------------------------------------------------------------------------- Foreign checkpoints

C, LAYERS, HEADS, KV_HEADS, HS, VOCAB, HIDDEN = 32, 2, 4, 2, 8, 100, 96  # HIDDEN as Meta computes it from C
HF_TINY = dict(
    block_size=64, vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_kv_head=KV_HEADS, n_embd=C, head_size=HS,
    intermediate_size=HIDDEN, norm_eps=1e-5,
)  # fmt: skip


def tiny_hf(mistral: bool = False, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCAB, hidden_size=C, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2,
    )  # fmt: skip
    config, kind = (MistralConfig, MistralForCausalLM) if mistral else (LlamaConfig, LlamaForCausalLM)
    model = kind(config(**{**sizes, **changes})).eval()
    for name, param in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(param, 0.5, 1.5)  # at ones a norm in the wrong place would pass
    return model


@torch.no_grad()
def check_logits(folder: Path, theirs: LlamaForCausalLM, tolerance: float = 1e-5) -> None:
    ours = load_model(folder)
    idx = torch.randint(ours.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=tolerance, rtol=1e-5)


def refused(match: str, out: Path, convert, *args, **kwargs) -> None:
    """The call raises a UserError that matches, and leaves no ``out`` and no temporary file next to it."""
    before = set(out.parent.iterdir())
    with pytest.raises(UserError, match=match):
        convert(*args, **kwargs)
    assert set(out.parent.iterdir()) == before and not out.exists()


def interleave(weight: torch.Tensor, n_head: int) -> torch.Tensor:
    """Half-split rows -> interleaved: row i of a head goes to 2i, row i + hs/2 to 2i + 1."""
    return weight.unflatten(0, (n_head, 2, -1)).transpose(1, 2).flatten(0, 2)


# Meta's name, and that in a GGUF. Written out once more: a mistake in layouts.py must not hide in the tests.
FOREIGN_NAMES = {
    "model.embed_tokens": ("tok_embeddings", "token_embd"), "model.norm": ("norm", "output_norm"),
    "lm_head": ("output", "output"), "model.layers": ("layers", "blk"),
    "input_layernorm": ("attention_norm", "attn_norm"), "post_attention_layernorm": ("ffn_norm", "ffn_norm"),
    "self_attn.q_proj": ("attention.wq", "attn_q"), "self_attn.k_proj": ("attention.wk", "attn_k"),
    "self_attn.v_proj": ("attention.wv", "attn_v"), "self_attn.o_proj": ("attention.wo", "attn_output"),
    "mlp.gate_proj": ("feed_forward.w1", "ffn_gate"), "mlp.up_proj": ("feed_forward.w3", "ffn_up"),
    "mlp.down_proj": ("feed_forward.w2", "ffn_down"),
}  # fmt: skip


def foreign_state(theirs: LlamaForCausalLM, is_gguf: bool) -> dict[str, torch.Tensor]:
    """The tensors as in Meta's files or in a GGUF. Both interleave q and k; a GGUF has no head of a tied model."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        for part, n_head in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            tensor = interleave(tensor, n_head) if part in name else tensor
        for hf, foreign in FOREIGN_NAMES.items():
            name = name.replace(hf, foreign[is_gguf])
        state[name] = tensor
    if is_gguf and theirs.config.tie_word_embeddings:
        del state["output.weight"]
    return state


EXPORT_SHAPES = {
    "grouped": dict(),
    "tied, scaled": dict(tie_embeddings=True, rope_scaling=LLAMA_31_SCALING, rope_base=500000.0),
    "linear": dict(rope_scaling={"factor": 2.0}),
    "odd sizes": dict(n_embd=39, n_head=3, n_kv_head=1, head_size=10, norm_eps=1e-2),
    "biases": dict(bias=True),
}


def base_with_controls(folder, controls: list[str], bos: str | None, eos: str):
    """A base whose tokenizer has further control tokens, and one in front of every text if ``bos``."""
    base = make_base(folder, vocab_size=259 + len(controls))
    tokenizer = TokenizersTokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens(controls)
    if bos:
        special = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing([bos, "$A"], None, special)
    tokenizer.save(str(base / "tokenizer.json"))
    write_json(base / "tokenizer_config.json", {"eos_token": eos, **({"bos_token": bos} if bos else {})})
    return base


HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]
TALK = [
    {"role": "system", "content": "Answer briefly, please."},
    {"role": "user", "content": "Where is the bakery?\nI am hungry."},
    {"role": "assistant", "content": "In the second street."},
    {"role": "user", "content": "  And the   'station'?\n"},
    {"role": "assistant", "content": "Behind you!\n"},
    {"role": "user", "content": "Größe 漢字 🙂"},
]


# ---------------------------------------------------------------------------- Texts for tokenizers

# SmolLM2's vocabulary has no tokens for some bytes; see the docstring of Tokenizer.
SMOLLM2_UNKNOWN = {4, 6, 0x13, 0x14, 0x16, 0x1D, *range(0x40000, 0xC0000)}
CODE_POINTS = [i for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
PIECES = """
The quick brown fox doesn't jump; it's they've I'LL we'd 'tis O'Neill's Straße façade naïve Ελληνικά Привет, мир!
def forward(self,x): return x**2+1 #comment {"key":[1,2.5,-3e10]} for(i=0;i<n;i++){a[i]+=0x1F;} <p class='a'>&amp;</p>
日本語の漢字とカナ 中文，标点。 한국어 ไทย العربية עברית हिन्दी தமிழ் Tiếng ğüşıöç é ą́ ﷽ ½ ² Ⅻ ④ ٣٤ ५६ 三
2024-01-31 1,234,567.89 007 3.14159 100% 42nd 1st x86_64 v1.2.3 192.168.0.1 +49(30)12345 1e-5 $9.99 №5 0b1010
😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ ∀x∈ℝ ∑ ≠ → ─── … “quoted” «ça» — _under_score_ CamelCaseWord ALLCAPS !!!??? ...--- === ~~~ \\n https://a.b/c?d=e&f=1
""".split()
SPACES = ["", " ", " ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000", "    \n\t", " " * 17]


@functools.cache
def assigned() -> list[str]:
    """The characters of an old Unicode, so that no two libraries' tables differ."""
    known = [i for i in CODE_POINTS if i not in SMOLLM2_UNKNOWN]
    return [chr(i) for i in known if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Co", "Cs")]


def varied_strings(n: int, seed: int = 0) -> list[str]:
    """Pieces of code and languages, numbers and random characters, between spaces of all kinds."""
    rng = random.Random(seed)

    def piece() -> str:
        kind = rng.random()
        if kind < 0.7:
            return rng.choice(PIECES)
        if kind < 0.85:
            return str(rng.randrange(10 ** rng.randrange(1, 9)))
        return "".join(rng.choice(assigned()) for _ in range(rng.randrange(1, 5)))

    def text() -> str:
        return "".join(rng.choice(SPACES) + piece() for _ in range(rng.randrange(1, 12))) + rng.choice(SPACES)

    return [text() for _ in range(n)]


def byte_level_bpe(steps: list, special: list[str], **options) -> TokenizersTokenizer:
    """A small byte-level BPE of 600 tokens, trained on texts split by ``steps``."""
    tokenizer = TokenizersTokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(varied_strings(300, seed=5), trainer)
    return tokenizer


def train_sentencepiece(folder, **options) -> sentencepiece.SentencePieceProcessor:
    """A small tokenizer.model like LLaMA's, in place of tokenizer.json: BPE, bytes for what is unknown."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(varied_strings(600, seed=3)), model_writer=model, model_type="bpe", vocab_size=1200,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        character_coverage=0.98, allow_whitespace_only_pieces=True, control_symbols=["<ctl>"], minloglevel=2, **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


# -------------------------------------------------------------------- Scripts as a user types them


def command(script: str, *flags: object, torchrun: Sequence = ()) -> list[str]:
    """``torchrun``: its flags, where it starts the script's processes."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    return [sys.executable, *map(str, [*launcher, ROOT / script, *flags])]


def run_process(script: str, *flags: object, torchrun: Sequence = ()) -> subprocess.CompletedProcess:
    options = dict(capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL)
    return subprocess.run(command(script, *flags, torchrun=torchrun), cwd=ROOT, **options)


@contextmanager
def job(script: str, *flags: object, torchrun: Sequence = ()) -> Iterator[subprocess.Popen]:
    """A script that runs during the block, and the processes that it starts."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = command(script, *flags, torchrun=torchrun)
    process = subprocess.Popen(started, cwd=ROOT, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_steps(process: subprocess.Popen, out_dir: Path, steps: int) -> None:
    """Until a run in another process has taken so many steps."""
    deadline = time.monotonic() + 300
    while len(metrics(out_dir)) < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def run(script: str, *flags: object, cwd: Path = ROOT, stdin: str = "") -> subprocess.CompletedProcess:
    """The script as ``__main__``, but in this process: importing torch a hundred times takes minutes."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", command(script, *flags)[1:])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.chdir(cwd)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(sys.argv, code, stdout.getvalue(), stderr.getvalue())


def succeed(script: str, *flags: object) -> str:
    result = run(script, *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refuse(script: str, *flags: object, message: str, cwd: Path = ROOT) -> None:
    """Exit code 2, and one error on stderr, of one line with ``message``, which only notes may follow."""
    result = run(script, *flags, cwd=cwd)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("note:", "warning:"))]
    assert re.search(message, lines[-1]) and len(lines[-1]) < 700, result.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], result.stderr


# ------------------------------------------------------------------ Finetune scripts called from Python

ARGS = dict(max_steps=6, batch_size=5, learning_rate=0.02, warmup_steps=2, eval_every=3, save_every=2)


def finetune(folder: Path, out_dir: Path, method: str = "adapter", **flags) -> None:
    """``main`` of finetune/METHOD.py over folder/base and folder/sums. ``flags`` are those of the command line."""
    kinds = dict(train=TrainArgs, hardware=Hardware, data_options=DataOptions)
    values = {**ARGS, "precision": "32-true", **flags}
    groups = {
        group: kind(**{name: values[name] for name in values if name in kind.__dataclass_fields__})
        for group, kind in kinds.items()
    }
    flags = {name: value for name, value in flags.items() if not any(hasattr(one, name) for one in groups.values())}
    defaults = dict(checkpoint_dir=str(folder / "base"), data=str(folder / "sums"), eval_samples=0)
    if method == "adapter":
        defaults |= dict(prompt_length=4, start_layer=1, prompt_init="normal")
    main = importlib.import_module(f"finetune.{method}").main
    main(out_dir=str(out_dir), **groups, **{**defaults, **flags})


def bytes_of(out_dir: Path) -> list[bytes]:
    """What a resumed run must end with, to the byte."""
    return [path.read_bytes() for path in sorted(out_dir.rglob("*.safetensors"))]


def timeless_metrics(out_dir: Path) -> list[dict]:
    """The rows of metrics.csv without the seconds: what a run must repeat."""
    return [{**row, "seconds": ""} for row in metrics(out_dir)]
