"""Checkpoint folders and trained folders: whole or absent, strict, and only ever with their own base."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import make_base, save_trained
from safetensors.torch import load_file

from lit_llama import trained
from lit_llama.checkpoint import fingerprint, load_config, load_model, tensor_shapes, weight_files
from lit_llama.common.errors import UserError
from lit_llama.common.files import read_json, save_tensors, write_json
from lit_llama.formats.shards import save_checkpoint
from lit_llama.generate.load import load_trained_folder


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [4 * 2**30, 10_000])
def test_round_trip_in_one_file_or_in_shards(tmp_path, tied, shard_bytes):
    model = load_model(make_base(tmp_path / "base", tie_embeddings=tied))
    state = {name: model.state_dict()[name] for name in tensor_shapes(model.config)}
    assert ("lm_head.weight" in state) is not tied
    (tmp_path / "copy").mkdir()
    save_checkpoint(tmp_path / "copy", model.config, state.items(), shard_bytes)
    assert (len(weight_files(tmp_path / "copy")) > 1) is (shard_bytes == 10_000)
    assert len({path.stat().st_mode for path in (tmp_path / "copy").iterdir()}) == 1  # safetensors' own is 600
    copy = load_model(tmp_path / "copy")
    assert asdict(copy.config) == asdict(model.config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)
    assert (copy.lm_head.weight is copy.transformer.wte.weight) is tied
    assert fingerprint(tmp_path / "copy") == fingerprint(tmp_path / "base")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_weights_stay_memory_mapped_where_the_dtype_is_the_stored_one(base):
    def mapped():
        return str(base / "model.safetensors") in Path("/proc/self/maps").read_text()

    assert not mapped()
    model = load_model(base)
    assert mapped()
    del model
    half = load_model(base, torch.bfloat16)
    assert not mapped() and half.transformer.wte.weight.dtype == torch.bfloat16


def test_a_checkpoint_that_lacks_a_tensor_is_not_written_silently(tmp_path):
    config = load_config(make_base(tmp_path / "base"))
    with pytest.raises(UserError, match="is missing"):
        save_checkpoint(tmp_path, config, [("transformer.wte.weight", torch.zeros(259, 32))])
    with pytest.raises(UserError, match="appears twice"):
        save_checkpoint(tmp_path, config, [("a", torch.zeros(1))] * 2)


def test_fingerprint_tells_a_single_tensor_apart(base):
    before = fingerprint(base)
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.h.1.rms_2.weight"] *= 1.01
    save_tensors(base / "model.safetensors", tensors)
    assert fingerprint(base) != before


def test_the_base_may_move_and_may_be_from_before_biases(base, tmp_path):
    save_trained(base, tmp_path / "out", "adapter")
    config = read_json(base / "config.json")
    assert config.pop("bias") is False
    write_json(base / "config.json", config)
    base.rename(tmp_path / "moved")
    load_trained_folder(tmp_path / "out", tmp_path / "moved")


def test_a_relative_base_is_found_from_any_folder(base, tmp_path, monkeypatch):
    """A trained folder names a base inside the clone by its path from there."""
    monkeypatch.setattr(trained, "ROOT", tmp_path)
    save_trained(base, tmp_path / "out", "adapter")
    assert read_json(tmp_path / "out/method.json")["base"]["checkpoint_dir"] == "base"
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(folder)
        load_trained_folder(tmp_path / "out")
