"""What the documentation says: its commands parse, its Python runs, and its example of a method is right."""

import ast
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import equal_to, logits_of, make_base, script_parser, shake, tiny_model, tokens, transformers_model

import finetune.lora
from lit_llama import cli
from lit_llama.generate.decode import generate
from lit_llama.generate.load import load_trained_folder
from lit_llama.methods.table import METHODS
from lit_llama.settings import DEFAULT_BASE
from lit_llama.train.loss import target_loss
from lit_llama.trained import trained_tensors

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "finetune/README.md", ROOT / "data/README.md"]
DOCS = sorted((ROOT / "docs").glob("*.md"))
SCRIPT_FOLDERS = ("finetune", "generate", "scripts", "data")
SCRIPTS = [path for folder in SCRIPT_FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


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
        parser = script_parser(ROOT / script)
        for arg in args:
            if arg.startswith("--"):
                assert arg in {option for action in parser._actions for option in action.option_strings}, (script, arg)
        cli.parse(parser, cli.gather(args, "runs"))


def test_a_wrong_command_would_be_found():
    ((script, *args),) = commands("```\npython finetune/lora.py --rank 8    # not its name\n```")
    with pytest.raises(cli.UserError, match="unknown flag --rank"):
        cli.parse(script_parser(ROOT / script), args)


@pytest.mark.parametrize("page", [*READMES, *DOCS, ROOT / "CONTRIBUTING.md"], ids=str)
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
    """A tiny model takes the place of the default base."""
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
    assert len(code.split("\n\n")[1].strip().splitlines()) == 4  # after the imports


def test_the_lines_that_matter_are_those_of_the_code():
    page = READMES[1].read_text(encoding="utf-8").split("## How to add a method")[0]
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "lit_llama/methods").glob("*.py"))
    shown = [line for block in page.split("```python\n")[1:] for line in block.split("```")[0].splitlines()]
    assert len(shown) > 12
    for line in shown:
        assert re.split(r" +# ", line)[0].strip() in code, line


# (IA)^3, the example of a method


@pytest.fixture(scope="module")
def add_ia3():
    code = code_block(READMES[1], "How to add a method")
    assert len(code.splitlines()) <= 40
    module = types.ModuleType("ia3")
    sys.modules["ia3"] = module
    exec(compile(code, "finetune/README.md", "exec"), module.__dict__)
    return module.add_ia3


def with_ia3(add_ia3, on: bool = True, **changes):
    model = tiny_model(**changes).requires_grad_(False)
    add_ia3(model)
    if on:
        shake(model)
    return model


def test_ia3_begins_as_the_base_and_trains_its_vectors_alone(add_ia3):
    base, model, ids = tiny_model(), with_ia3(add_ia3, on=False), tokens()
    assert torch.equal(logits_of(model, ids), logits_of(base, ids))
    assert set(base.state_dict()) < set(model.state_dict())
    config = model.config
    count = config.n_layer * (2 * config.n_kv_head * config.head_size + config.intermediate_size)
    assert sum(tensor.numel() for tensor in trained_tensors(model).values()) == count
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(trained_tensors(model).values(), lr=0.1)
    target_loss(model, ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained_tensors(model)), name


def test_ia3_decodes_with_a_cache_as_without(add_ia3):
    model, prompt = with_ia3(add_ia3), tokens(1)[0].tolist()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert list(generate(model, prompt, 6, stop=set())) == ids[len(prompt) :]


@pytest.mark.parametrize("changes", [dict(), dict(n_kv_head=6)], ids=["grouped", "not grouped"])
def test_ia3_equals_peft(add_ia3, changes):
    from peft import IA3Config, get_peft_model

    model = with_ia3(add_ia3, **changes)
    modules = ["k_proj", "v_proj", "down_proj"]
    config = IA3Config(target_modules=modules, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(transformers_model(tiny_model(**changes)), config)
    with torch.no_grad():
        for block, layer in zip(model.transformer.h, theirs.base_model.model.model.layers, strict=True):
            layer.self_attn.k_proj.ia3_l["default"].copy_(block.attn.l_k.reshape(-1, 1))
            layer.self_attn.v_proj.ia3_l["default"].copy_(block.attn.l_v.reshape(-1, 1))
            layer.mlp.down_proj.ia3_l["default"].copy_(block.mlp.c_proj.l_ff.reshape(1, -1))
    equal_to(theirs, model)


def test_ia3_is_found_by_a_trained_folder(add_ia3, tmp_path, monkeypatch):
    """What the page says of METHODS."""
    from lit_llama.checkpoint import load_model
    from lit_llama.common.files import save_tensors, write_json
    from lit_llama.trained import METHOD_FILE, TRAINED_FILE, describe_base, kept_tensors

    base = make_base(tmp_path / "base")
    model = load_model(base).requires_grad_(False)
    add_ia3(model)
    shake(model)
    save_tensors(tmp_path / "out" / TRAINED_FILE, kept_tensors(model))
    described = {"method": "ia3", "arguments": {}, "base": describe_base(base), "prompt_style": "chatml"}
    write_json(tmp_path / "out" / METHOD_FILE, described)
    with pytest.raises(cli.UserError, match="'ia3', not one of"):
        load_trained_folder(tmp_path / "out")
    monkeypatch.setitem(METHODS, "ia3", add_ia3)
    loaded, _ = load_trained_folder(tmp_path / "out")
    ids = torch.tensor([[5, 9, 30, 77]])
    assert torch.equal(loaded(ids), model(ids))
