"""Several trained folders in one batch: the answers are those of each folder alone, in one forward pass per token."""

import json
from pathlib import Path

import pytest
import torch
from helpers import make_base

from lit_llama.checkpoint import load_model
from lit_llama.common.files import save_tensors, write_json
from lit_llama.generate.decode import generate, generate_batch
from lit_llama.generate.load import load_trained_folder
from lit_llama.generate.mixed import Mixer
from lit_llama.methods.table import METHODS
from lit_llama.trained import METHOD_FILE, TRAINED_FILE, describe_base, kept_tensors, trained_tensors

FOLDERS = {
    "adapter-5": ("adapter", dict(prompt_length=5, start_layer=1)),
    "adapter-2": ("adapter", dict(prompt_length=2, start_layer=0, gate="layer", gate_activation="tanh")),
    "prefix-3": ("prefix", dict(prompt_length=3)),
    "prefix-6": ("prefix", dict(prompt_length=6)),
    "soft-4": ("soft_prompt", dict(prompt_length=4)),
    "soft-7": ("soft_prompt", dict(prompt_length=7)),
    "lora-qv": ("lora", dict(r=3)),
    "lora-all": ("lora", dict(r=2, targets=["q", "k", "v", "proj", "fc1", "fc2", "mlp_proj"])),
}


def trained_folder(path: Path, base: Path, method: str, arguments: dict) -> Path:
    """A folder as a finetune script writes it, with random numbers that matter."""
    model = load_model(base).requires_grad_(False)
    METHODS[method](model, **arguments)
    generator = torch.Generator().manual_seed(len(str(arguments)))
    with torch.no_grad():
        for tensor in trained_tensors(model).values():
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    path.mkdir()
    save_tensors(path / TRAINED_FILE, kept_tensors(model))
    description = dict(method=method, arguments=arguments, base=describe_base(base), prompt_style="chatml")
    write_json(path / METHOD_FILE, description)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("mixed") / "base")


@pytest.fixture(scope="module")
def folders(base) -> list[Path]:
    return [trained_folder(base.parent / name, base, *what) for name, what in FOLDERS.items()]


def mixer_of(base: Path, folders: list[Path]) -> Mixer:
    mixer = Mixer(load_model(base))
    for folder in folders:
        mixer.add(folder)
    return mixer


def test_a_batch_of_all_methods_answers_as_each_alone(base, folders):
    tasks = [None, *folders, *folders[::-1], None]
    prompts = [[40 + (7 * i + j) % 90 for j in range(1 + (5 * i) % 9)] for i in range(len(tasks))]
    alone = []
    for task, prompt in zip(tasks, prompts, strict=True):
        model = load_model(base) if task is None else load_trained_folder(task)[0]
        alone.append(list(generate(model, prompt, 12, stop={5, 6, 7, 8})))
    mixer, passes = mixer_of(base, folders), []
    mixer.model.transformer.ln_f.register_forward_hook(lambda *_: passes.append(1))
    stops = [{5, 6, 7, 8}] * len(tasks)
    together = generate_batch(mixer.model, mixer.assign(tasks, prompts), 12, stops)
    assert together == alone
    assert len({tuple(answer) for answer in alone}) > len(folders) // 2  # the folders do differ
    longest = max(map(len, alone))
    assert len(passes) == min(12, longest + 1)  # one for the prompts, then one for each token, for all rows at once


def test_rows_that_end_early_leave_the_others_as_they_are(base, folders):
    tasks, prompts = list(folders), [[50 + i] for i in range(len(folders))]
    whole = [list(generate(load_trained_folder(task)[0], p, 10, set())) for task, p in zip(tasks, prompts, strict=True)]
    stops = [{answer[1 + i % 2]} if i % 3 else set() for i, answer in enumerate(whole)]
    alone = [
        list(generate(load_trained_folder(task)[0], prompt, 10, stop))
        for task, prompt, stop in zip(tasks, prompts, stops, strict=True)
    ]
    mixer = mixer_of(base, folders)
    assert generate_batch(mixer.model, mixer.assign(tasks, prompts), 10, stops) == alone
    assert len({len(answer) for answer in alone}) > 1


def test_a_batch_holds_the_base_once(base, folders):
    model = load_model(base)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    mixer = Mixer(model)
    for folder in folders:
        mixer.add(folder)
    after = mixer.model.state_dict()
    assert all(after[name].data_ptr() == pointer for name, pointer in before.items())


def test_methods_that_change_the_base_are_refused(base, tmp_path):
    folder = trained_folder(tmp_path / "houlsby", base, "houlsby", dict(bottleneck_size=2))
    with pytest.raises(ValueError, match="houlsby.*can mix adapter, prefix, soft_prompt, lora"):
        Mixer(load_model(base)).add(folder)
    method = json.loads((folder / METHOD_FILE).read_text())
    assert method["method"] == "houlsby"
