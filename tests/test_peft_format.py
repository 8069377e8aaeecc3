"""What we export loaded by PEFT over transformers, and what PEFT trained imported: the same logits both ways."""

from pathlib import Path

import peft
import pytest
import torch
from helpers import SCALING, equal_to, make_base, refused, save_trained, succeed, transformers_model
from safetensors.torch import load_file, save_file

from lit_llama.checkpoint import load_model
from lit_llama.common.files import read_json, write_json
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
THEIRS = {
    "adapter": (peft.AdaptionPromptConfig, dict(adapter_len=5, adapter_layers=2)),
    "prefix": (peft.PrefixTuningConfig, dict(num_virtual_tokens=4)),
    "prefix, MLP": (peft.PrefixTuningConfig, dict(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=9)),
    "soft_prompt": (peft.PromptTuningConfig, dict(num_virtual_tokens=4)),
    "lora": (peft.LoraConfig, dict(r=3, lora_alpha=16, target_modules=["q_proj", "v_proj"])),
    "lora on all": (peft.LoraConfig, dict(r=3, lora_alpha=5, target_modules=MODULES, lora_dropout=0.1)),
    "lora on top": (peft.LoraConfig, dict(r=3, target_modules=["q_proj"], layers_to_transform=[1, 2])),
    "lora, rank-stabilized": (peft.LoraConfig, dict(r=3, target_modules="all-linear", use_rslora=True)),
}


def train_theirs(base: Path, folder: Path, case: str) -> peft.PeftModel:
    """PEFT's own model over the base, after some of its own steps; saved to ``folder``."""
    torch.manual_seed(5)
    kind, settings = THEIRS[case]
    model = peft.get_peft_model(transformers_model(load_model(base)), kind(**settings, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for ids in torch.randint(0, 259, (5, 2, 20)):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", OURS)
def test_export(tmp_path, case, shape):
    base, (method, arguments) = make_base(tmp_path / "base", **SHAPES[shape]), OURS[case]
    trained = save_trained(base, tmp_path / "trained", method, **arguments)
    export_hf(base, tmp_path / "hf")
    export = ["--trained_dir", trained, "--out_dir", tmp_path / "peft", "--base_model", tmp_path / "hf"]
    succeed("scripts/export.py", "--to", "peft", *export)
    trainable = case.startswith(("adapter", "lora"))  # PEFT goes on training no prompt
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", is_trainable=trainable)
    equal_to(theirs, load_trained_folder(trained)[0], load_model(base))
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
    equal_to(theirs, model, load_model(base))
    assert (method["prompt_style"], method["train"]["max_seq_length"]) == ("template", 99)

    export_peft(tmp_path / "ours", tmp_path / "again")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_not_exported(tmp_path):
    base, out = make_base(tmp_path / "base"), tmp_path / "peft"
    trained = save_trained(base, tmp_path / "houlsby", "houlsby")
    refused("was trained with houlsby, which PEFT lacks", out, export_peft, trained, out)
    trained = save_trained(base, tmp_path / "heads", "adapter", prompt_length=5, start_layer=1)
    refused("block 1 has gates from .* --gate layer", out, export_peft, trained, out)
    for name, changes, match in (("a", dict(bias=True), "without biases"), ("b", dict(head_size=6), "4 [*] 6 and 32")):
        trained = save_trained(make_base(tmp_path / name, **changes), tmp_path / f"{name}2", "adapter", start_layer=1)
        refused(match, out, export_peft, trained, out)


FOREIGN = [
    ("peft_type", "IA3"), ("task_type", "SEQ_CLS"), ("use_dora", True), ("bias", "lora_only"),
    ("modules_to_save", ["lm_head"]), ("fan_in_fan_out", True), ("rank_pattern", {"q_proj": 2}),
    ("layers_to_transform", [1]), ("init_lora_weights", "pissa"), ("some_later_invention", 1.0),
]  # fmt: skip
WRONG = [("r", "8"), ("r", None), ("lora_alpha", None), ("lora_dropout", "x"), ("layers_to_transform", "all")]


def test_what_is_not_imported(tmp_path):
    base, source, out = make_base(tmp_path / "base"), tmp_path / "peft", tmp_path / "ours"
    train_theirs(base, source, "lora")
    settings = read_json(source / "adapter_config.json")
    for key, value in FOREIGN + WRONG:
        write_json(source / "adapter_config.json", {**settings, key: value})
        refused(f"{key} " if (key, value) in FOREIGN else "cannot be converted", out, import_peft, source, base, out)
    write_json(source / "adapter_config.json", settings)
    weights = source / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    for broken, match in (
        ({**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(3, 32)}, "lm_head.* is not expected"),
        ({key: tensor for key, tensor in tensors.items() if key != name}, "is missing"),
        ({**tensors, name: torch.ones(2, 2)}, "has shape"),
    ):
        save_file(broken, weights)
        refused(match, out, import_peft, source, base, out)
    weights.rename(source / "adapter_model.bin")
    refused("cannot be read as tensors, and nothing in it was run", out, import_peft, source, base, out)
    torch.save(tensors, source / "adapter_model.bin")
    import_peft(source, base, out)
    assert (out / "trained.safetensors").exists()


OTHER_BASE = {"prefix": "over tiny a prefix has 32 columns", "soft_prompt": "has shape", "adapter": "lacks .*layers.0"}


@pytest.mark.parametrize("case", OTHER_BASE)
def test_prompts_of_another_base_are_refused(tmp_path, case):
    smaller = make_base(tmp_path / "smaller", n_layer=2, n_embd=16, n_head=2, n_kv_head=1)
    train_theirs(make_base(tmp_path / "base"), tmp_path / "peft", case)
    refused(OTHER_BASE[case], tmp_path / "ours", import_peft, tmp_path / "peft", smaller, tmp_path / "ours")
