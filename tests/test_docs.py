"""What the documentation says: its commands parse, its Python runs, its example of a method and lm_eval are right."""

import ast
import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import (
    CASES,
    ROOT,
    SCRIPTS,
    check_cached_decoding,
    equal_to,
    logits_of,
    make_base,
    save_trained,
    script_parser,
    tiny_model,
    transformers_model,
    tuned,
)
from peft import IA3Config, get_peft_model

import finetune.lora
from lit_llama import cli
from lit_llama.formats.export import export_hf
from lit_llama.formats.peft import export_peft
from lit_llama.generate.load import load_trained_folder
from lit_llama.methods.table import METHODS
from lit_llama.settings import DEFAULT_BASE
from lit_llama.tokenizer import Tokenizer

READMES = [ROOT / "README.md", ROOT / "finetune/README.md", ROOT / "data/README.md"]
DOCS = sorted((ROOT / "docs").glob("*.md"))


def commands(text: str) -> list[list[str]]:
    """Script and arguments of every ``python some/script.py ...``, in a block or within a line."""
    text = text.replace("\\\n", " ")  # a line that goes on
    found = re.findall(r"python ((?:finetune|generate|scripts|data)/\w+\.py[^\n`]*)", text)
    return [shlex.split(re.split(r" +(?:#|&&|<|\|)", command)[0]) for command in found]


@pytest.mark.parametrize("path", [*READMES, *DOCS, *SCRIPTS], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_command_can_be_given(path):
    text = path.read_text(encoding="utf-8")
    found = commands(text if path.suffix == ".md" else ast.get_docstring(ast.parse(text)))
    assert found or path.stem == "security"
    for script, *args in found:
        cli.parse(script_parser(ROOT / script), args)  # raises for an unknown flag


@pytest.mark.parametrize("page", [*READMES, *DOCS, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_and_named_functions_exist(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
    for name, file in re.findall(r"`(\w+)` in `([\w/]+\.py)`", text):
        assert re.search(rf"^ *(def |class )?{name}\b", (ROOT / file).read_text(encoding="utf-8"), re.M), name


def code_block(path: Path, heading: str) -> str:
    """The first Python block below a heading."""
    return path.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("```python\n")[1].split("```")[0]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """Unchanged, with a tiny model in place of the default base."""
    base = str(make_base(tmp_path / "base"))
    main = finetune.lora.main
    monkeypatch.setattr(main, "__defaults__", tuple(base if it == DEFAULT_BASE else it for it in main.__defaults__))
    monkeypatch.setattr("lit_llama.settings.DEFAULT_BASE", base)
    monkeypatch.chdir(tmp_path)
    code = code_block(READMES[0], "From Python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "trainable parameters:" in printed and "exact match after" in printed
    assert names["method"]["method"] == "lora" and names["method"]["data"] == "rows"


def test_the_lines_that_matter_are_those_of_the_code():
    page = READMES[1].read_text(encoding="utf-8").split("## How to add a method")[0]
    files = [*(ROOT / "lit_llama/methods").glob("*.py"), ROOT / "lit_llama/generate/decode.py"]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    shown = [line for block in page.split("```python\n")[1:] for line in block.split("```")[0].splitlines()]
    assert len(shown) > 12
    for line in shown:
        assert re.split(r" +# ", line)[0].strip() in code, line


@pytest.fixture
def add_ia3(monkeypatch):
    code = code_block(READMES[1], "How to add a method")
    module = types.ModuleType("ia3")
    monkeypatch.setitem(sys.modules, "ia3", module)
    exec(compile(code, "finetune/README.md", "exec"), module.__dict__)
    monkeypatch.setitem(METHODS, "ia3", module.add_ia3)
    monkeypatch.setitem(CASES, "ia3", ("ia3", {}))


@pytest.mark.parametrize("changes", [dict(), dict(n_kv_head=6)], ids=["grouped", "not grouped"])
def test_ia3_equals_peft_and_decodes_with_a_cache(add_ia3, changes):
    model = tuned("ia3", **changes)
    modules = ["k_proj", "v_proj", "down_proj"]
    config = IA3Config(target_modules=modules, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(transformers_model(tiny_model(**changes)), config)
    with torch.no_grad():
        for block, layer in zip(model.transformer.h, theirs.base_model.model.model.layers, strict=True):
            layer.self_attn.k_proj.ia3_l["default"].copy_(block.attn.l_k.reshape(-1, 1))
            layer.self_attn.v_proj.ia3_l["default"].copy_(block.attn.l_v.reshape(-1, 1))
            layer.mlp.down_proj.ia3_l["default"].copy_(block.mlp.c_proj.l_ff.reshape(1, -1))
    equal_to(theirs, model, tiny_model(**changes))
    check_cached_decoding(model.eval().double())


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
CHOICES = ["four", "blue as the sea", "d"]


@pytest.mark.slow  # lm_eval reads the files of its thousands of tasks first
@pytest.mark.parametrize(
    ("method", "arguments"),
    [("lora", dict(r=2, alpha=4, dropout=0.0, targets=["q", "fc1"])), ("soft_prompt", dict(prompt_length=3))],
)
def test_lm_eval_on_an_exported_folder_gives_our_log_probabilities(tmp_path, monkeypatch, method, arguments):
    lm_eval = pytest.importorskip("lm_eval.__main__")
    base = make_base(tmp_path / "base")
    trained = save_trained(base, tmp_path / "trained", method, **arguments)
    export_hf(base, tmp_path / "hf")
    export_peft(trained, tmp_path / "peft")
    rows = [{"question": question, "choices": CHOICES} for question in ("Two and two?", "The sky is", "A b c")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(TASK.format(folder=tmp_path))

    (line,) = re.findall(r"lm_eval --model hf[^`]*", (ROOT / "docs/formats.md").read_text(encoding="utf-8"))
    line = line.replace("exported/base", str(tmp_path / "hf")).replace("out/peft/bookings", str(tmp_path / "peft"))
    line = line.replace("arc_easy", f"tiny --include_path {tmp_path} --device cpu --log_samples")
    line = line.replace("pretrained=", "dtype=float32,pretrained=") + f" --output_path {tmp_path / 'results'}"
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval.cli_evaluate()

    (written,) = (tmp_path / "results").rglob("samples_tiny_*.jsonl")
    samples = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(samples) == len(rows)
    model, tokenizer = load_trained_folder(trained)[0].eval(), Tokenizer(base)
    for sample in samples:
        prompt = tokenizer.encode(sample["doc"]["question"])
        for choice, answer in zip(CHOICES, sample["filtered_resps"], strict=True):
            ids = tokenizer.encode(f" {choice}")
            with torch.no_grad():
                logits = logits_of(model, torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert float(answer[0]) == pytest.approx(logits[range(len(ids)), ids].sum().item(), abs=1e-3)
