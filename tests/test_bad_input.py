"""What users get wrong, through the real command lines: exit code 2, one line that says so, and nothing overwritten."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import make_base, run, run_process, sums, write_rows
from safetensors.torch import load_file

from lit_llama.common.files import save_tensors

Case = tuple[Callable[[Path], list], str]  # what to do to a copy of the places, giving the command; the message
CASES: dict[str, Case] = {}

FINETUNE = ["finetune/adapter.py", "--checkpoint_dir", "base", "--data", "data", "--out_dir", "new"]
FINETUNE += ["--start_layer", 1, "--train.max_steps", 2, "--eval_samples", 0]
BASE = ["generate/base.py", "--checkpoint_dir", "base", "--max_new_tokens", 2, "--prompt", "hi"]
TRAINED = ["generate/adapter.py", "--trained_dir", "out", "--max_new_tokens", 2, "--prompt", "hi"]
EVALUATE = ["scripts/evaluate.py", "--trained_dir", "out", "--data", "data"]
BATCH = ["generate/batch.py", "--requests", "requests.jsonl"]
LABELS = ["finetune/full.py", "--head", "classifier", "--train.max_steps", 2, *FINETUNE[1:7]]
CONVERT = ["scripts/convert.py", "--out_dir", "new"]


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_tensors(path, tensors)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def lie(path: Path, change: Callable[[dict], object]) -> None:
    """Change a safetensors file's header and leave its data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


# config.json

CONFIG = {
    "lacks a field": (dict(n_layer=...), "config.json is not a config of this project: missing .'n_layer'"),
    "has another field": (dict(hidden_size=3), "unknown .'hidden_size'"),
    "-1 layers": (dict(n_layer=-1), "n_layer must be a positive integer of a plausible size, got -1"),
    "1e9 layers": (dict(n_layer=10**9), "n_layer must be .*, got 1000000000"),
    "4000 layers": (dict(n_layer=4000), "config.json has n_layer 4000, but the files 2. tensors"),
    "4 layers": (dict(n_layer=4), "h.3.* is missing"),
    "layers in words": (dict(n_layer="3"), "n_layer must be .*, got '3'"),
    "layers as a float": (dict(n_layer=3.0), "n_layer must be .*, got 3.0"),
    "layers as a switch": (dict(n_layer=True), "n_layer must be .*, got True"),
    "huge width": (dict(n_embd=10**15), "n_embd must be .*, got 1000000000000000"),
    "sizes past 64 bits": (
        dict.fromkeys(("n_embd", "n_head", "n_kv_head", "head_size"), 2**24),
        "no model has the sizes",
    ),
    "odd heads": (dict(head_size=7), "head_size must be even .*, got 7"),
    "heads of no group": (dict(n_kv_head=3), "n_head 4 is not a multiple of n_kv_head 3"),
    "other width": (dict(intermediate_size=49), r"instead of \(49, 32\)"),
    "no epsilon": (dict(norm_eps=0), "norm_eps must be a number above 0, got 0"),
    "epsilon in words": (dict(norm_eps="small"), "norm_eps must be a number above 0, got 'small'"),
    "NaN": (dict(norm_eps=float("nan")), "norm_eps must be a number above 0, got nan"),
    "infinity": (dict(rope_base=float("inf")), "rope_base must be a number above 0, got inf"),
    "negative rotation": (dict(rope_base=-1.0), "rope_base must be a number above 0, got -1.0"),
    "scaling of another kind": (dict(rope_scaling={"type": "yarn"}), "rope_scaling needs exactly"),
    "scaling that is a number": (dict(rope_scaling=2), "config.json: "),
    "tied by a word": (dict(tie_embeddings="no"), "tie_embeddings must be a bool, got 'no'"),
    "name a number": (dict(name=7), "name must be a str, got 7"),
    "tied or not": (dict(tie_embeddings=True), "lm_head.weight is not expected"),
}


def config_case(changes: dict) -> Callable[[Path], list]:
    def prepare(place: Path) -> list:
        path = place / "base" / "config.json"
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
        (place / "base" / "tokenizer.json").touch()
        return BASE

    return prepare


CASES |= {f"config: {name}": (config_case(changes), message) for name, (changes, message) in CONFIG.items()}

# files of a base and of a trained folder: (file, what to do to it, message)

WEIGHTS = "base/model.safetensors"
TENSORS = {
    "is missing": (Path.unlink, "model.safetensors is missing"),
    "is empty": (lambda p: p.write_bytes(b""), "model.safetensors is not a complete safetensors file"),
    "is cut": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "is not a complete safetensors file"),
    "is text": (lambda p: p.write_text("weights " * 99), "is not a complete safetensors file"),
    "is a folder": (lambda p: (p.unlink(), p.mkdir()), "is not a complete safetensors file"),
    "has a flipped bit": (lambda p: flip(p, -100), "is damaged: its checksum does not match"),
    "has a flipped bit in its header": (lambda p: flip(p, 60), "is not a complete|is damaged|does not fit"),
    "claims an endless header": (lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]), "is not a complete"),
    "claims a header past its end": (
        lambda p: p.write_bytes(struct.pack("<Q", 2**26) + p.read_bytes()[8:]),
        "is not a complete",
    ),
    "claims a shape past its end": (
        lambda p: lie(p, lambda h: next(v for k, v in h.items() if k[0] == "t").update(shape=[2**40, 2**20])),
        "is not a complete",
    ),
    "has tensors that overlap": (
        lambda p: lie(p, lambda h: [v.update(data_offsets=[0, 4]) for k, v in h.items() if k[0] == "t"]),
        "is not a complete",
    ),
    "is of whole numbers": (
        lambda p: edit_tensors(p, lambda t: t.update({k: v.int() for k, v in t.items()})),
        "has dtype I32, not F32",
    ),
    "is of doubles": (
        lambda p: edit_tensors(p, lambda t: t.update({k: v.double() for k, v in t.items()})),
        "has dtype F64, not F32",
    ),
    "has a tensor too many": (
        lambda p: edit_tensors(p, lambda t: t.update(extra=torch.ones(1))),
        "extra is not expected",
    ),
    "has a tensor too few": (lambda p: edit_tensors(p, lambda t: t.pop(min(t))), "is missing .1 differences"),
    "has another shape": (
        lambda p: edit_tensors(p, lambda t: t.update({min(t): torch.ones(3, 3)})),
        r"has shape \(3, 3\) instead of",
    ),
}


def file_case(name: str, change: Callable[[Path], object], command: list) -> Callable[[Path], list]:
    return lambda place: (change(place / name), command)[1]


for name, (change, message) in TENSORS.items():
    CASES[f"base {name}"] = file_case(WEIGHTS, change, BASE), message
    message = message.replace("model.safetensors", "trained.safetensors")
    CASES[f"trained folder {name}"] = file_case("out/trained.safetensors", change, TRAINED), message

INDEX = "base/model.safetensors.index.json"
FILES = {
    "index out of the folder": (INDEX, '{"weight_map": {"a": "../x"}}', BASE, "file names of its own folder"),
    "index to above": (INDEX, '{"weight_map": {"a": ".."}}', BASE, "file names of its own folder"),
    "index of lists": (INDEX, '{"weight_map": {"a": ["x"]}}', BASE, "file names of its own folder"),
    "index to nothing": (INDEX, '{"weight_map": {"a": "x.safetensors"}}', BASE, "x.safetensors is missing"),
    "config empty": ("base/config.json", "", BASE, "config.json is not valid JSON"),
    "config cut": ("base/config.json", '{"name": "ti', BASE, "config.json is not valid JSON: Unterminated"),
    "config a list": ("base/config.json", "[]", BASE, "config.json must hold a JSON object, got list"),
    "config too deep": ("base/config.json", "[" * 10**5, BASE, "config.json is not valid JSON: nested too deeply"),
    "config not UTF-8": ("base/config.json", b"\xff\xfe{}", BASE, "config.json is not valid JSON: 'utf-8'"),
    "tokenizer empty": ("base/tokenizer.json", "", BASE, "tokenizer.json is damaged .*copy it from the weights"),
    "tokenizer cut": ("base/tokenizer.json", '{"version": "1.0", "mod', BASE, "tokenizer.json is damaged"),
    "tokenizer's settings cut": ("base/tokenizer_config.json", "{", BASE, "tokenizer_config.json is not valid JSON"),
    "tokenizer without an end": ("base/tokenizer_config.json", "{}", BASE, "which token ends a text; name it in"),
    "tokenizer's end a number": ("base/tokenizer_config.json", '{"eos_token": 3}', BASE, "which token ends a text"),
    "tokenizer's end a list": ("base/tokenizer_config.json", '{"eos_token": []}', BASE, "which token ends a text"),
    "method.json empty": ("out/method.json", "", TRAINED, "method.json is not valid JSON"),
    "method.json of nothing": ("out/method.json", "{}", TRAINED, "method.json lacks method"),
    "method.json too deep": ("out/method.json", '{"a":' * 10**5, TRAINED, "nested too deeply"),
}
for name, (path, content, command, message) in FILES.items():
    data = content if isinstance(content, bytes) else content.encode()
    CASES[name] = file_case(path, lambda p, data=data: p.write_bytes(data), command), message


def other_tokenizer(place: Path) -> list:
    vocab = json.loads((place / "base/tokenizer.json").read_text())
    vocab["model"]["vocab"] = dict(list(vocab["model"]["vocab"].items())[:-9] + [("far", 4000)])
    (place / "base/tokenizer.json").write_text(json.dumps(vocab))
    return BASE


def no_tokenizer(place: Path) -> list:
    (place / "base/tokenizer.json").rename(place / "base/tokenizer.model")
    return BASE


CASES |= {
    "no base": (lambda place: [*BASE, "--checkpoint_dir", "none"], "none is missing; fetch a base with"),
    "empty base": (
        lambda place: ((place / "e").mkdir(), [*BASE, "--checkpoint_dir", "e"])[1],
        "e holds neither tokenizer",
    ),
    "tokenizer of another model": (other_tokenizer, "the tokenizer has 4001 tokens, but the model 259"),
    "tokenizer of no format": (no_tokenizer, "tokenizer.model is not a sentencepiece model"),
}

# method.json

METHOD = {
    "another method": (dict(method="lora"), "arguments do not fit lora"),
    "an import": (dict(method="os.system"), "names the method 'os.system', not one of"),
    "a path": (dict(method="../../evil"), "names the method '../../evil', not one of"),
    "a number": (dict(method=3), "method must be a str, got 3"),
    "features": (dict(method="features"), "names the method 'features', not one of|answers"),
    "fewer rows": (dict(arguments={"prompt_length": 4, "start_layer": 1}), "does not fit the model"),
    "1e9 rows": (dict(arguments={"prompt_length": 10**9, "start_layer": 1}), "prompt_length 10* must lie within"),
    "1e30 rows": (dict(arguments={"prompt_length": 10**30, "start_layer": 1}), "arguments do not fit adapter"),
    "another scale": (dict(arguments={"start_layer": 1, "gate_init": 0.5}), "gate_init.*0.5.*, but trained"),
    "a style that it has": (dict(prompt_style="plain"), "prompt_style is plain, but .* was trained with chatml"),
    "no whole number": (dict(arguments={"prompt_length": "ten"}), "arguments do not fit adapter"),
    "a negative block": (dict(arguments={"start_layer": -1}), "start_layer -1 must lie within 0 and 2"),
    "an unknown argument": (dict(arguments={"rows": 4}), "arguments do not fit adapter"),
    "an argument twice": (dict(arguments={"model": 4}), "arguments do not fit adapter"),
    "arguments a list": (dict(arguments=[10, 1]), "arguments must be a dict"),
    "labels a text": (dict(arguments={"labels": "yes no"}), "labels must be a list of texts"),
    "labels none": (dict(arguments={"labels": []}), "labels must be a list of texts"),
    "another style": (dict(prompt_style="vicuna"), "prompt_style is vicuna, but .* was trained with chatml"),
    "no style": (dict(prompt_style=None), "prompt_style must be a str, got None"),
    "a base that is none": (dict(base="base"), "base must be a dict, got base"),
    "a base of nothing": (dict(base={}), "lacks checkpoint_dir"),
    "a fingerprint of nothing": (
        dict(base={"checkpoint_dir": "base", "name": "tiny", "fingerprint": 0}),
        "fingerprint must be a str, got 0",
    ),
    "a base elsewhere": (
        dict(base={"checkpoint_dir": "none", "name": "tiny", "fingerprint": "0"}),
        "trained on tiny in none, which is missing; pass --checkpoint_dir",
    ),
    "any file as its base": (
        dict(base={"checkpoint_dir": "/etc/passwd", "name": "tiny", "fingerprint": "0"}),
        "passwd",
    ),
    "a length of nothing": (dict(train={}), "lacks max_seq_length"),
}


def method_case(changes: dict) -> Callable[[Path], list]:
    return lambda place: (edit_json(place / "out/method.json", **changes), TRAINED)[1]


CASES |= {f"method.json: {name}": (method_case(changes), message) for name, (changes, message) in METHOD.items()}
CASES |= {
    "trained over another base": (
        lambda place: [*TRAINED, "--checkpoint_dir", "other"],
        "trained on tiny .fingerprint",
    ),
    "no trained folder": (lambda place: [*TRAINED, "--trained_dir", "none"], "no finetune script wrote"),
    "labels asked of text": (
        lambda place: ["generate/classify.py", *TRAINED[1:3], "--prompt", "a"],
        "see generate.adapter",
    ),
    "merged into what exists": (
        lambda place: ["scripts/merge_lora.py", "--trained_dir", "out", "--out_dir", "base"],
        "which cannot be merged",
    ),
    "style of another tokenizer": (lambda place: [*EVALUATE, "--prompt_style", "llama3"], "has no control token"),
}

# data

ROW = {"instruction": "a", "output": "b"}
DATA = {
    "not UTF-8": ("rows.json", b'[\n{"text": "\xff"}]', r"rows.json:2: not UTF-8"),
    "empty": ("rows.json", b"", "rows.json:1: not valid JSON"),
    "no rows": ("rows.json", b"[]", "rows.json holds no rows"),
    "no lines": ("rows.jsonl", b"\n\n", "rows.jsonl holds no rows"),
    "one row": ("rows.jsonl", json.dumps(ROW), "1 rows are too few to split off 10%"),
    "an object": ("rows.json", json.dumps(ROW), "must hold an array of rows; one object per line is .jsonl"),
    "cut": ("rows.json", '[{"instruction": "a", "outp', "not valid JSON"),
    "too much": ("rows.json", "[] []", "rows.json:1: not valid JSON: Extra data"),
    "too deep": ("rows.json", "[" * 10**5, "rows.json: not valid JSON: .*recursion|nested too deeply"),
    "too deep in a line": ("rows.jsonl", '{"text": ' * 10**5, "rows.jsonl:1: not valid JSON"),
    "a NaN": ("rows.jsonl", '{"text": NaN}', "rows.jsonl:1: text must be a string, got NaN"),
    "a number": ("rows.jsonl", '{"instruction": 1, "output": "b"}', "instruction must be a string, got 1"),
    "a null": ("rows.jsonl", '{"instruction": "a", "output": null}', "output must be a string, got null"),
    "a row that is none": ("rows.jsonl", "3", "rows.jsonl:1: a row must be an object, got int"),
    "a huge number": ("rows.jsonl", '{"text": 1' + "0" * 5000 + "}", "rows.jsonl:1: "),
    "missing keys": ("rows.jsonl", '{"prompt": "a"}', "a row needs instruction and output.*this one has 'prompt'"),
    "messages of nobody": ("rows.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "hold no assistant turn"),
    "messages of a stranger": (
        "rows.jsonl",
        '{"messages": [{"role": "tool", "content": "a"}]}',
        "needs a role of system",
    ),
    "messages of no list": ("rows.jsonl", '{"messages": "a"}', "must be a list of objects"),
    "ragged": (
        "rows.csv",
        "instruction,output\na,b\na,b,c\n",
        "rows.csv:3: the row does not have the header's 2 columns",
    ),
    "short": ("rows.csv", "instruction,output\na\n", "rows.csv:2: the row does not have the header's 2 columns"),
    "an open quote": ("rows.csv", 'instruction,output\na,"b\n', "rows.csv:1: unexpected end of data"),
    "a zero byte": ("rows.csv", "instruction,output\na,\0\n" * 3, "rows.csv|none of"),
    "a column too few": ("rows.csv", "instruction\na\n", "a row needs instruction and output"),
    "another suffix": ("rows.parquet", "x", "data files end in .json"),
    "only prompts": (
        "rows.jsonl",
        "".join(json.dumps({"instruction": str(i), "output": ""}) + "\n" for i in range(40)),
        "none of .* samples has an answer",
    ),
    "10 MB prompts": (
        "rows.jsonl",
        "".join(json.dumps({"instruction": str(i) + "x" * 10**7, "output": "b"}) + "\n" for i in range(2)),
        "2 rows are too few|none of .* samples has an answer",
    ),
    "half an emoji": (
        "rows.jsonl",
        "".join(f'{{"instruction": "{i}\\ud83d", "output": "b"}}\n' for i in range(40)),
        "lone surrogate",
    ),
}


def data_case(name: str, content: str | bytes) -> Callable[[Path], list]:
    def prepare(place: Path) -> list:
        (place / "mine").mkdir()
        (place / "mine" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [*FINETUNE, "--data", f"mine/{name}"]

    return prepare


CASES |= {f"data: {name}": (data_case(path, content), message) for name, (path, content, message) in DATA.items()}
CASES |= {
    "data: none": (lambda place: [*FINETUNE, "--data", "none"], "--data none is missing"),
    "data: a folder of others": (lambda place: [*FINETUNE, "--data", "base"], "base holds no train file"),
    "data: two of a kind": (
        lambda place: (shutil.copy(place / "data/train.json", place / "data/train.jsonl"), FINETUNE)[1],
        "train.json and train.jsonl; keep one",
    ),
    "data: no labels": (lambda place: LABELS, "a classifier needs rows with one of its labels"),
    "data: no such split": (lambda place: [*EVALUATE, "--split", "test"], "holds no test file"),
}

# prompts and requests

REQUESTS = {
    "of nothing": ("", "requests.jsonl holds no rows"),
    "cut": ('{"prompt": ', "requests.jsonl:1: not valid JSON"),
    "without a prompt": ('{"input": "a"}', 'requests.jsonl:1: a request needs a "prompt"'),
    "of numbers": ('{"prompt": 3}', 'requests.jsonl:1: a request needs a "prompt"'),
    "not UTF-8": (b'{"prompt": "\xff"}', "requests.jsonl:1: not UTF-8"),
    "to nothing": ('{"prompt": "a", "trained_dir": "none"}', "no finetune script wrote none"),
}


def request_case(content: str | bytes) -> Callable[[Path], list]:
    data = content if isinstance(content, bytes) else content.encode()
    return file_case("requests.jsonl", lambda p: p.write_bytes(data), BATCH)


CASES |= {f"requests {name}": (request_case(content), message) for name, (content, message) in REQUESTS.items()}
CASES |= {
    "requests: none": (lambda place: BATCH, "requests.jsonl is missing"),
    "prompt too long": (lambda place: [*BASE, "--prompt", "a" * 600], "do not fit the context of 512 tokens; shorten"),
    "prompt empty": (lambda place: [*BASE, "--prompt", "", "--prompt_style", "plain"], "the prompt is empty"),
    "prompt of half an emoji": (lambda place: [*BASE, "--prompt", "a\udcff"], "lone surrogate, .* at character"),
    "answer of no tokens": (lambda place: [*TRAINED, "--max_new_tokens", 0], "choose max_new_tokens from 1 to"),
    "answer too long": (lambda place: [*TRAINED, "--max_new_tokens", 10**9], "choose max_new_tokens from 1 to"),
}

# flags: (the command, further flags, message)

FLAGS = [
    (FINETUNE, ["--train.batch_size", 0], "--train.batch_size 0 must lie within 1 and 65536"),
    (FINETUNE, ["--train.batch_size", "many"], "train.batch_size.*int.*many"),
    (FINETUNE, ["--train.learning_rate", -1], "--train.learning_rate -1.0 must lie within 0 and 100"),
    (FINETUNE, ["--train.learning_rate", "nan"], "train.learning_rate.*float.*nan"),
    (FINETUNE, ["--train.clip", "inf"], "train.clip.*float.*inf"),
    (FINETUNE, ["--train.max_steps", 0], "--train.max_steps 0 must lie within 1 and"),
    (FINETUNE, ["--train.warmup_steps", 9], "warmup_steps 9 must be less than the 2 steps in all"),
    (FINETUNE, ["--train.max_seq_length", 2], "--train.max_seq_length 2 must lie within 3 and"),
    (FINETUNE, ["--train.max_seq_length", 600], "600 exceeds the base's context of 512"),
    (FINETUNE, ["--train.eval_every", 0], "--train.eval_every 0 must lie within 1 and"),
    (FINETUNE, ["--train.seed", 10**19], "--train.seed 1.* must lie within 0 and 4294967295"),
    (FINETUNE, ["--train.speed", 3], "unknown flag --train.speed; did you mean --train.seed"),
    (FINETUNE, ["--train.max_steps"], "--train.max_steps: expected one argument"),
    (FINETUNE, ["--precision", "8-bit"], "--precision '8-bit' is none of auto"),
    (FINETUNE, ["--devices", -5], "--devices -5"),
    (FINETUNE, ["--devices", 100_000], "--devices 100000: this CPU has only .* cores; .*torchrun --nproc_per"),
    (FINETUNE, ["--prompt_length", 10**12], "prompt_length 1000000000000 must lie within 1 and 512"),
    (FINETUNE, ["--train.batch_size", 10**12], "--train.batch_size 1000000000000 must lie within 1 and 65536"),
    (FINETUNE, ["--gate_lr_scale", "1e300"], "--gate_lr_scale 1e.300 must lie within 0 and 100"),
    (FINETUNE, ["--out_dir", "loop"], "loop cannot be written"),
    (["finetune/lora.py", *FINETUNE[1:7]], ["--r", 10**9], "r 1000000000 must lie within 1 and 32"),
    (["scripts/compare_methods.py", *FINETUNE[1:7]], ["--ablation_steps", -1], "--ablation_steps -1 must lie within"),
    (FINETUNE, ["--strategy", "warp"], "--strategy warp is none of auto, ddp, fsdp"),
    (FINETUNE, ["--eval_samples", -1], "eval_samples -1 must not be negative"),
    (FINETUNE, ["--prompt_style", "vicuna"], "'vicuna' is none of alpaca"),
    (FINETUNE, ["--prompt_length", 0], "prompt_length 0 must lie within 1 and 512"),
    (FINETUNE, ["--start_layer", 3], "start_layer 3 must lie within 0 and 2"),
    (FINETUNE, ["--gate", "row"], "gate is 'head' or 'layer'"),
    (FINETUNE, ["--resume", "--overwrite"], "give one of them"),
    (FINETUNE, ["--resume"], "nothing to resume: new/state/state.safetensors is missing; start again without --resume"),
    (FINETUNE, ["--allow_changes"], "--allow_changes is for --resume"),
    (FINETUNE, ["--resume", "perhaps"], "resume.*bool.*perhaps"),
    (FINETUNE, ["--out_dir", "data/train.json"], "--out_dir data/train.json is a file"),
    (
        FINETUNE,
        ["--out_dir", "data/train.json/new"],
        "data/train.json/new cannot be written .*Not a directory|is a file",
    ),
    (FINETUNE, ["--out_dir", "base"], "--out_dir base is the base itself"),
    (FINETUNE, ["--out_dir", "other"], "holds a checkpoint that no run wrote"),
    (FINETUNE, ["--out_dir", "out"], "out holds a run already .*--resume .*--overwrite"),
    (
        FINETUNE,
        ["--out_dir", "out", "--resume", "--prompt_length", 3],
        "arguments.prompt_length was 10, now 3.*--overwrite",
    ),
    (FINETUNE, ["--out_dir", "out", "--resume", "--allow_changes", "--prompt_length", 3], "now 3.*--overwrite"),
    (FINETUNE, ["--checkpoint_dir", "out"], "out holds what adapter learned over base, not a base"),
    (BASE, ["--checkpoint_dir", "out"], "out holds what adapter learned over base, not a base"),
    (["generate/chat.py", *TRAINED[1:3]], ["--prompt_style", "alpaca"], "out is asked as it was in training"),
    (FINETUNE, ["--out_dir", "out", "--resume", "--data", "data/train.json"], "data_fingerprint was"),
    (FINETUNE, ["--out_dir", "out", "--resume", "--checkpoint_dir", "other"], "base.fingerprint was"),
    (FINETUNE, ["--config", "none.yaml"], "none.yaml"),
    (FINETUNE, ["--config", "data/train.json"], "Unexpected config: "),
    (LABELS, ["--head", "both"], "head.*'language', 'classifier'.*both"),
    (["finetune/lora.py", *FINETUNE[1:7]], ["--r", 0], "r 0 must lie within 1 and 32"),
    (["finetune/lora.py", *FINETUNE[1:7]], ["--dropout", 1.5], "dropout 1.5"),
    (["finetune/features.py", *FINETUNE[1:7]], ["--max_seq_length", 0], "--max_seq_length 0 must lie within 1 and"),
    (["finetune/features.py", *FINETUNE[1:7]], ["--classifier", "oracle"], "--classifier 'oracle' is none of"),
    (BASE, ["--sampling.temperature", -1], "temperature, other than 0 .greedy., -1.0 must lie within"),
    (BASE, ["--sampling.top_p", 0.5], "pass a --sampling.temperature above 0 with them"),
    (BASE, ["--sampling.top_p", 2, "--sampling.temperature", 1], "top_p 2.0 must lie within 1e-06 and 1"),
    (BASE, ["--sampling.seed", 10**30, "--sampling.temperature", 1], "seed 1.* must lie within 0 and 4294967295"),
    (BASE[:5], [], "are required: prompt"),
    (EVALUATE, ["--shots", -1], "--shots -1 must lie within 0 and"),
    (EVALUATE, ["--results", "none/there/data.json/x", "--max_samples", 0], "--max_samples 0 must lie within 1 and"),
    (CONVERT, ["--source", "hf"], "hf is neither a .gguf file, a lit-llama.pth, nor a folder with config.json"),
    (CONVERT, ["--source", "none.gguf"], "none.gguf is missing"),
    (CONVERT, ["--source", "base", "--out_dir", "other"], "other exists already; remove it or choose another name"),
    (CONVERT, ["--source", "base", "--dtype", "int8"], "dtype.*float16.*int8"),
    (CONVERT, ["--source", "base", "--prompt_style", "plain"], "a Hugging Face folder does not take --prompt_style"),
    (FINETUNE, ["--checkpoint_dir", "none"], "none is missing; fetch a base"),
    (FINETUNE, ["--prompt_init", "zero"], "prompt_init.*'text', 'normal'.*zero"),
    (FINETUNE, ["--gate_init", 1], "gates start at zero: pass --prompt_init normal"),
    (EVALUATE, ["--batch_size", 0], "batch_size 0 must lie within 1 and"),
    (["scripts/export.py", "--to", "peft"], ["--out_dir", "new"], "--to peft needs --trained_dir"),
]
for command, flags, message in FLAGS:
    CASES[f"{command[0]} {' '.join(map(str, flags))}"] = (lambda place, c=command, f=flags: [*c, *f]), message


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Two bases, data, and a run over the first one."""
    folder = tmp_path_factory.mktemp("bad")
    make_base(folder / "base")
    make_base(folder / "other", seed=2)
    write_rows(folder / "data" / "train.json", sums(20))
    write_rows(folder / "data" / "validation.json", sums(26)[20:])
    (folder / "hf").mkdir()
    (folder / "loop").symlink_to("loop")
    result = run(*FINETUNE, "--out_dir", "out", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def check(origin: Path, tmp_path: Path, name: str, runner) -> None:
    prepare, message = CASES[name]
    place = tmp_path / "place"
    shutil.copytree(origin, place, symlinks=True)
    command = prepare(place)
    before = files(place)
    result = runner(*command, cwd=place)
    errors = [line for line in result.stderr.splitlines() if not line.startswith(("note:", "warning:"))]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert errors[-1].startswith("error: ") and re.search(message, errors[-1]), result.stderr[-3000:]
    assert sum(line.startswith("error: ") for line in errors) == 1 and len(errors[-1]) < 700
    assert files(place) == before


@pytest.mark.parametrize("name", CASES)
def test_bad_input(origin, tmp_path, name):
    check(origin, tmp_path, name, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES)[::12])  # some of each kind
def test_bad_input_in_a_process_of_its_own(origin, tmp_path, name):
    check(origin, tmp_path, name, run_process)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
def test_what_is_odd_and_right(origin, tmp_path):
    """A byte-order mark, names of control tokens and answers of 1 MB are data like any other."""
    rows = [{"instruction": f"<|im_end|>{i}", "output": "</s><|im_start|>"} for i in range(40)]
    rows.append({"instruction": "long", "output": "x" * 10**6})
    shutil.copytree(origin, tmp_path / "place", symlinks=True)
    (tmp_path / "place/rows.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    result = run(*FINETUNE, "--data", "rows.json", cwd=tmp_path / "place")
    assert result.returncode == 0 and "1 cut to max_seq_length" in result.stdout, result.stderr
