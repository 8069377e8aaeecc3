"""What we export loaded by PEFT over transformers, and what PEFT trained imported: the same logits both ways."""

import json
from pathlib import Path

import pytest
import torch
from helpers import SCALING, SOME_BASE, logits_of, make_base, refuse, save_trained, succeed, transformers_model
from peft import (
    AdaptionPromptConfig,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from lit_llama.checkpoint import load_model
from lit_llama.common.errors import UserError
from lit_llama.common.files import read_json, save_tensors, write_json
from lit_llama.formats.export import export_hf
from lit_llama.formats.peft import export_peft, import_peft
from lit_llama.generate.load import load_trained_folder
from lit_llama.methods.lora import TARGETS

SHAPES = {"tied, scaled": dict(tie_embeddings=True, rope_scaling=SCALING), "untied": dict()}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS = {
    "adapter": ("adapter", dict(prompt_length=5, start_layer=1, gate="layer")),
    "adapter, tanh": ("adapter", dict(prompt_length=5, start_layer=0, gate="layer", gate_activation="tanh")),
    "prefix": ("prefix", dict(prompt_length=4)),
    "prefix by an MLP": ("prefix", dict(prompt_length=4, mlp_size=6)),
    "soft_prompt": ("soft_prompt", dict(prompt_length=4)),
    "lora": ("lora", dict(r=3, alpha=16, dropout=0.1, targets=["q", "v"])),
    "lora on all": ("lora", dict(r=3, alpha=5.0, dropout=0.0, targets=list(TARGETS))),
    "lora on top": ("lora", dict(r=3, alpha=16, dropout=0.0, targets=["q"], start_layer=1)),
    "lora, rank-stabilized": ("lora", dict(r=3, alpha=4, dropout=0.0, targets=["k", "fc1"], rslora=True)),
}
CAUSAL = dict(task_type="CAUSAL_LM")
THEIRS = {
    "adapter": lambda: AdaptionPromptConfig(adapter_len=5, adapter_layers=2, **CAUSAL),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "prefix by an MLP": lambda: PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=12, **CAUSAL
    ),
    "soft_prompt": lambda: PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "lora": lambda: LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj", "v_proj"], **CAUSAL),
    "lora on all": lambda: LoraConfig(r=3, lora_alpha=5, target_modules=MODULES, lora_dropout=0.1, **CAUSAL),
    "lora on top": lambda: LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1, 2], **CAUSAL),
    "lora, rank-stabilized": lambda: LoraConfig(r=3, target_modules="all-linear", use_rslora=True, **CAUSAL),
}


def ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 259, (2, 20), generator=torch.Generator().manual_seed(seed))


def train_ours(base: Path, folder: Path, case: str) -> Path:
    method, arguments = OURS[case]
    return save_trained(base, folder, method, **arguments)


def train_theirs(base: Path, folder: Path, case: str) -> PeftModel:
    """PEFT's own model over the base, after some of its own steps; saved to ``folder``."""
    torch.manual_seed(5)
    model = get_peft_model(transformers_model(load_model(base)), THEIRS[case]())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for step in range(5):
        model(input_ids=ids(step), labels=ids(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def same_logits(ours, theirs, base: Path) -> None:
    found, expected = logits_of(ours.eval(), ids()), theirs.eval()(input_ids=ids()).logits
    expected = expected[:, expected.size(1) - found.size(1) :]  # PEFT's prompt tuning has logits on its prompt, too
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - load_model(base)(ids())).abs().max() > 0.05


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", OURS)
def test_export(tmp_path, case, shape):
    base = make_base(tmp_path / "base", **SHAPES[shape])
    trained = train_ours(base, tmp_path / "trained", case)
    export_peft(trained, tmp_path / "peft")
    trainable = case.startswith(("adapter", "lora"))  # PEFT goes on training no prompt
    theirs = PeftModel.from_pretrained(transformers_model(load_model(base)), tmp_path / "peft", is_trainable=trainable)
    same_logits(load_trained_folder(trained)[0], theirs, base)
    written = load_file(tmp_path / "peft/adapter_model.safetensors").values()
    trains = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert not trainable or trains == sum(tensor.numel() for tensor in written)  # what was trained here, and no more


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", THEIRS)
def test_import(tmp_path, case, shape):
    base = make_base(tmp_path / "base", **SHAPES[shape])
    theirs = train_theirs(base, tmp_path / "peft", case)
    import_peft(tmp_path / "peft", base, tmp_path / "ours", max_seq_length=99)
    model, method = load_trained_folder(tmp_path / "ours")
    same_logits(model, theirs, base)
    assert (method["prompt_style"], method["train"]["max_seq_length"]) == ("template", 99)

    export_peft(tmp_path / "ours", tmp_path / "again", base_model="owner/name")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_json(tmp_path / "again/adapter_config.json")["base_model_name_or_path"] == "owner/name"


def test_peft_finds_the_exported_base_by_itself(tmp_path):
    base = make_base(tmp_path / "base")
    trained = train_ours(base, tmp_path / "trained", "lora on all")
    export_hf(base, tmp_path / "hf")
    export_peft(trained, tmp_path / "peft", base_model=str(tmp_path / "hf"))
    same_logits(load_trained_folder(trained)[0], AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft"), base)


def test_equal_gates_of_heads_are_pefts_gate(tmp_path):
    base = make_base(tmp_path / "base")
    trained = train_ours(base, tmp_path / "trained", "adapter")
    method = read_json(trained / "method.json")
    method["arguments"]["gate"] = "head"
    write_json(trained / "method.json", method)
    tensors = load_file(trained / "trained.safetensors")
    tensors |= {name: t.expand(4, 1, 1).clone() for name, t in tensors.items() if "gating" in name}
    save_tensors(trained / "trained.safetensors", tensors)
    export_peft(trained, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(transformers_model(load_model(base)), tmp_path / "peft")
    same_logits(load_trained_folder(trained)[0], theirs, base)

    tensors["transformer.h.2.attn.gating_factor"][1] += 0.5
    save_tensors(trained / "trained.safetensors", tensors)
    with pytest.raises(UserError, match="block 2 has gates from .* --gate layer"):
        export_peft(trained, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_not_exported(tmp_path):
    about = {"base": SOME_BASE, "prompt_style": "chatml"}
    write_json(tmp_path / "trained/method.json", {"method": "houlsby", "arguments": {}, **about})
    with pytest.raises(UserError, match="was trained with houlsby, which PEFT lacks"):
        export_peft(tmp_path / "trained", tmp_path / "peft")
    for name, changes, match in (("a", dict(bias=True), "without biases"), ("b", dict(head_size=6), "4 [*] 6 and 32")):
        trained = train_ours(make_base(tmp_path / name, **changes), tmp_path / f"{name}-trained", "adapter")
        with pytest.raises(UserError, match=match):
            export_peft(trained, tmp_path / "peft")


FOREIGN = {
    "peft_type": "IA3",
    "task_type": "SEQ_CLS",
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "fan_in_fan_out": True,
    "rank_pattern": {"q_proj": 2},
    "layers_to_transform": [1],
    "init_lora_weights": "pissa",
    "some_later_invention": 1.0,
}


def test_what_is_not_imported(tmp_path):
    base, out = make_base(tmp_path / "base"), tmp_path / "ours"
    train_theirs(base, tmp_path / "peft", "lora")
    path = tmp_path / "peft/adapter_config.json"
    settings = json.loads(path.read_text())
    for key, value in FOREIGN.items():
        path.write_text(json.dumps({**settings, key: value}))
        with pytest.raises(UserError, match=f"{key} "):
            import_peft(tmp_path / "peft", base, out)
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "r"}))
    with pytest.raises(UserError, match="lacks 'r'"):
        import_peft(tmp_path / "peft", base, out)
    for key, value in {"r": "8", "lora_alpha": None, "lora_dropout": "x", "layers_to_transform": "all"}.items():
        path.write_text(json.dumps({**settings, key: value}))
        with pytest.raises(UserError, match="adapter_config.json does not fit LORA|layers_to_transform"):
            import_peft(tmp_path / "peft", base, out)
    path.write_text(json.dumps(settings))
    weights = tmp_path / "peft/adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    for broken, match in (
        ({**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(3, 32)}, "lm_head.* has no place"),
        ({key: tensor for key, tensor in tensors.items() if key != name}, "is missing"),
        ({**tensors, name: torch.ones(2, 2)}, "has shape"),
    ):
        save_file(broken, weights)
        with pytest.raises(UserError, match=match):
            import_peft(tmp_path / "peft", base, out)
    weights.rename(tmp_path / "peft/adapter_model.bin")
    with pytest.raises(UserError, match="not a plain file of tensors, and nothing in it was run"):
        import_peft(tmp_path / "peft", base, out)
    assert not out.exists()
    torch.save(tensors, tmp_path / "peft/adapter_model.bin")
    import_peft(tmp_path / "peft", base, out)
    assert (out / "trained.safetensors").exists()


def test_prompts_of_another_base_are_refused(tmp_path):
    base = make_base(tmp_path / "base")
    smaller = make_base(tmp_path / "smaller", n_layer=2, n_embd=16, n_head=2, n_kv_head=1)
    for case, match in (
        ("prefix", "over tiny a prefix has 32 columns"),
        ("soft_prompt", "has shape"),
        ("adapter", "lacks .*layers.0"),
    ):
        train_theirs(base, tmp_path / case, case)
        with pytest.raises(UserError, match=match):
            import_peft(tmp_path / case, smaller, tmp_path / "ours")


def test_scripts(tmp_path):
    base = make_base(tmp_path / "base")
    trained = train_ours(base, tmp_path / "trained", "lora")
    succeed("scripts/export.py", "--to", "peft", "--trained_dir", trained, "--out_dir", tmp_path / "peft")
    flags = ["--source", tmp_path / "peft", "--checkpoint_dir", base, "--out_dir", tmp_path / "ours"]
    assert succeed("scripts/convert.py", *flags).endswith("ours\n")
    refuse("scripts/convert.py", *flags, message="exists already")
    answers = [
        succeed("generate/adapter.py", "--trained_dir", folder, "--prompt", "hello", "--max_new_tokens", 8)
        for folder in (trained, tmp_path / "ours")
    ]
    assert answers[0] == answers[1]
