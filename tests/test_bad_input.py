"""What users get wrong, through the real command lines: exit code 2, one line that says so, and nothing overwritten."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import files, make_base, refuse, run, sums, write_rows
from safetensors.torch import load_file

from lit_llama.common.files import read_json, save_tensors, write_json

FINETUNE = ("finetune/adapter.py", "--checkpoint_dir", "base", "--data", "data", "--out_dir", "new")
FINETUNE += ("--start_layer", 1, "--train.max_steps", 2, "--eval_samples", 0)
LABELS = ("finetune/full.py", "--head", "classifier", "--train.max_steps", 2, *FINETUNE[1:7])
FEATURES = ("finetune/features.py", *FINETUNE[1:7])
BASE = ("generate/base.py", "--checkpoint_dir", "base", "--max_new_tokens", 2, "--prompt", "hi")
TRAINED = ("generate/adapter.py", "--trained_dir", "out", "--max_new_tokens", 2, "--prompt", "hi")
EVALUATE = ("scripts/evaluate.py", "--trained_dir", "out", "--data", "data")
BATCH = ("generate/batch.py", "--requests", "requests.jsonl")
CONVERT = ("scripts/convert.py", "--out_dir", "new")


def json_with(**changes) -> Callable[[Path], object]:
    return lambda path: write_json(path, read_json(path) | changes)


def tensors_with(change: Callable[[dict], dict]) -> Callable[[Path], object]:
    return lambda path: save_tensors(path, change(load_file(path)))


def bytes_with(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


NOT_WHOLE, NOT_JSON = "is not a complete safetensors file", "is not valid JSON"
TENSORS = [
    (Path.unlink, "safetensors is missing"),
    (lambda path: (path.unlink(), path.mkdir()), NOT_WHOLE),
    (bytes_with(lambda b: b[:-9]), NOT_WHOLE),
    (bytes_with(lambda b: b[:-100] + bytes([b[-100] ^ 16]) + b[-99:]), "is damaged, or .* its checksum is wrong"),
    (tensors_with(lambda t: {name: tensor.double() for name, tensor in t.items()}), "has dtype F64, not F32"),
    (tensors_with(lambda t: t | {"extra": torch.ones(1)}), "extra is not expected"),
    (tensors_with(lambda t: {name: t[name] for name in sorted(t)[1:]}), "is missing .1 differences"),
    (tensors_with(lambda t: t | {min(t): torch.ones(3, 3)}), r"has shape \(3, 3\) instead of"),
]
ELSEWHERE, PASSWD = ({"checkpoint_dir": x, "name": "tiny", "fingerprint": "0"} for x in ("none", "/etc/passwd"))
FIRST = "it first: python scripts/convert.py --source .* --out_dir checkpoints"
FILES = {  # a file and the command that reads it: its content or a function that changes it, and the message
    ("base/model.safetensors", BASE): TENSORS,
    ("out/trained.safetensors", TRAINED): TENSORS,
    ("base/model.safetensors.index.json", BASE): [
        ('{"weight_map": {"a": "x.st"}}', "x.st is missing"),
        ('{"weight_map": {"a": "../x"}}', "file names of its own folder"),
        ('{"weight_map": {"a": ["x"]}}', "file names of its own folder"),
    ],
    ("base/config.json", BASE): [
        ("", NOT_JSON),
        ("[]", "config.json must hold a JSON object, got list"),
        (b"\xff", "config.json is not valid JSON: 'utf-8'"),
        (json_with(hidden_size=3), "config.json is not a config of this project: missing or unknown are hidden_size"),
        (json_with(n_layer=-1), "n_layer must be a positive integer of a plausible size, got -1"),
        (json_with(rope_scaling=2), "config.json: "),
        (json_with(architectures=["LlamaForCausalLM"]), f"base is a Hugging Face folder; convert {FIRST}/base$"),
    ],
    ("llama.gguf", (*FINETUNE, "--checkpoint_dir", "llama.gguf")): [
        ("GGUF", f"llama.gguf is a GGUF file; convert {FIRST}/llama$"),
    ],
    ("base/tokenizer.json", BASE): [
        (Path.unlink, "base holds neither tokenizer"),
        (lambda path: path.rename(path.with_suffix(".model")), "is not a sentencepiece model"),
        ('{"version": "1.0", "mod', "tokenizer.json is damaged .*copy it from the weights"),
    ],
    ("base/tokenizer_config.json", BASE): [
        ('{"eos_token": 3}', "which token ends a text; name it in"),
    ],
    ("out/method.json", TRAINED): [
        (Path.unlink, "no finetune script wrote"),
        ("{}", "method.json lacks method"),
        (json_with(method="lora"), "arguments do not fit lora"),
        (json_with(method="os.system"), "names the method 'os.system', not one of"),
        (json_with(method="features"), "names the method 'features', not one of|answers"),
        (json_with(arguments={"prompt_length": 4, "start_layer": 1}), "does not fit the model"),
        (json_with(arguments={"prompt_length": 10**9}), "prompt_length 10* must be between"),
        (json_with(arguments={"prompt_length": "ten"}), "arguments do not fit adapter"),
        (json_with(arguments={"start_layer": 1, "gate_init": 0.5}), "gate_init.*0.5.*, but trained"),
        (json_with(prompt_style="plain"), "prompt_style is plain, but .* was trained with template"),
        (json_with(base={}), "lacks checkpoint_dir"),
        (json_with(base=ELSEWHERE), "trained on tiny in .*none, which is missing; pass --checkpoint_dir"),
        (json_with(base=PASSWD), "passwd"),
        (json_with(train=None), "lacks train, or holds another type"),
    ],
    ("out/metrics.csv", (*FINETUNE, "--out_dir", "out", "--resume", "--allow_changes", "--train.max_steps", 3)): [
        ("step\none\n", "metrics.csv is damaged: a row lacks step or seconds; repair or remove it"),
    ],
    ("requests.jsonl", BATCH): [
        ('{"prompt', "requests.jsonl:1 is not valid JSON"),
        ('{"prompt": "x"}\n{"input": "a"}', 'requests.jsonl:2: a request needs a "prompt"'),
        ('{"prompt": "a", "trained_dir": "none"}', "no finetune script wrote none"),
    ],
}
FILE_CASES = [(file, command, *case) for (file, command), cases in FILES.items() for case in cases]

FLAGS = [  # the command, further flags, message; bounds of numbers: test_cli.py, test_methods.py; data: test_data.py
    (FINETUNE, ["--train.warmup_steps", 9], "warmup_steps 9 must be less than the 2 steps in all"),
    (FINETUNE, ["--train.max_seq_length", 600], "600 exceeds the base's context of 512"),
    (FINETUNE, ["--precision", "8-bit"], "--precision '8-bit' is none of auto"),
    (FINETUNE, ["--devices", 100_000], "--devices 100000 must be between 1 and"),
    (FINETUNE, ["--strategy", "warp"], "--strategy warp is none of auto, ddp, fsdp"),
    (FINETUNE, ["--eval_samples", -1], "eval_samples -1 must be between 0 and"),
    (FINETUNE, ["--gate_lr_scale", "1e300"], "--gate_lr_scale 1e.300 must be between 0 and 100"),
    (FINETUNE, ["--gate_init", 1], "pass --gate_init 0, or --prompt_init normal"),
    (("finetune/prefix.py",), ["--mlp_size", 8, "--prompt_init", "text"], "an MLP: pass --mlp_size 0"),
    (("finetune/soft_prompt.py",), ["--init_text", "# a"], "--init_text needs --prompt_init text"),
    (FINETUNE, ["--checkpoint_dir", "none"], "none is missing; fetch a base"),
    (FINETUNE, ["--checkpoint_dir", "out"], "out holds what adapter learned over base, not a base"),
    (FINETUNE, ["--data", "none"], "--data none is missing"),
    (FINETUNE, ["--config", "data/train.json"], "Unexpected config: "),
    (FINETUNE, ["--out_dir", "loop"], "File exists: 'loop'"),
    (FINETUNE, ["--out_dir", "data/train.json"], "data/train.json/method.json cannot be written .Not a directory"),
    (FINETUNE, ["--out_dir", "base"], "--out_dir base is the base itself"),
    (FINETUNE, ["--out_dir", "other"], "holds a checkpoint that no run wrote"),
    (FINETUNE, ["--out_dir", "out"], "out holds a run already .*--resume .*--overwrite"),
    (FINETUNE, ["--resume"], "nothing to resume: new/state/state.safetensors is missing; start again without --resume"),
    (FINETUNE, ["--resume", "--overwrite"], "give one of them"),
    (FINETUNE, ["--allow_changes"], "--allow_changes is for --resume"),
    (FINETUNE, ["--out_dir", "out", "--resume", "--allow_changes", "--prompt_length", 3], "was 10, now 3.*--overwrite"),
    (FINETUNE, ["--out_dir", "out", "--resume", "--gate_lr_scale", 0.5], "lr_scale was 0.25, now 0.5"),
    (FINETUNE, ["--out_dir", "out", "--resume", "--data", "data/train.json"], "data_fingerprint was"),
    (FINETUNE, ["--out_dir", "out", "--resume", "--checkpoint_dir", "other"], "base.fingerprint was"),
    (FEATURES, ["--max_seq_length", 0], "--max_seq_length 0 must be between 1 and"),
    (LABELS, [], "a classifier needs rows with one of its labels"),
    (("scripts/compare_methods.py", *FINETUNE[1:7]), ["--pilot_samples", -1], "--pilot_samples -1 must be between"),
    (BASE, ["--checkpoint_dir", "hf"], "hf holds neither|config.json is missing"),
    (BASE, ["--prompt", "", "--prompt_style", "plain"], "the prompt is empty"),
    (BASE, ["--compile", "--devices", 2], "a sharded base works with neither --compile nor --quantize"),
    (BASE, ["--num_nodes", 0], "--num_nodes 0 must be between 1 and"),
    (TRAINED, ["--max_new_tokens", 10**9], "choose max_new_tokens from 1 to"),
    (TRAINED, ["--checkpoint_dir", "other"], "trained on tiny .fingerprint"),
    (["generate/chat.py", *TRAINED[1:3]], ["--prompt_style", "alpaca"], "out keeps its prompt style from training"),
    (["generate/classify.py", *TRAINED[1:3]], ["--prompt", "a"], "see generate.adapter"),
    (BATCH, [], "requests.jsonl cannot be read as UTF-8 text: .*No such file"),
    (EVALUATE, ["--batch_size", 0], "batch_size 0 must be between 1 and"),
    (EVALUATE, ["--max_seq_length", 2], "max_seq_length 2 must be between 3 and"),
    (EVALUATE, ["--split", "test"], "holds no test file"),
    (["scripts/merge_lora.py", *TRAINED[1:3]], ["--out_dir", "base"], "which cannot be merged"),
    (("scripts/export.py", "--to", "peft"), ["--out_dir", "new"], "--to peft needs --trained_dir"),
    (CONVERT, ["--source", "hf"], "hf is neither a .gguf file nor a folder with config.json"),
    (CONVERT, ["--source", "none.gguf"], "none.gguf is missing"),
    (CONVERT, ["--source", "base", "--out_dir", "other"], "other exists already; remove it or choose another name"),
    (CONVERT, ["--source", "base", "--prompt_style", "plain"], "a Hugging Face folder does not take --prompt_style"),
]


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


@pytest.fixture
def place(origin, tmp_path):
    return shutil.copytree(origin, tmp_path / "place", symlinks=True)


def check_refusal(place: Path, command: list, message: str) -> None:
    before = files(place)
    refuse(*command, message=message, cwd=place)
    assert files(place) == before


@pytest.mark.parametrize(
    ("name", "command", "content", "message"), FILE_CASES, ids=[f"{c[0]}: {c[3]}" for c in FILE_CASES]
)
def test_a_wrong_file_is_refused_in_one_line(place, name, command, content, message):
    if callable(content):
        content(place / name)
    else:
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    check_refusal(place, command, message)


@pytest.mark.parametrize(("command", "flags", "message"), FLAGS, ids=[f"{c[0][0]}: {c[2]}" for c in FLAGS])
def test_wrong_flags_are_refused_in_one_line(place, command, flags, message):
    check_refusal(place, [*command, *flags], message)
