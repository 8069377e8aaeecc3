"""Several trained folders in one batch: the answers are those of each folder alone, in one forward pass per token."""

import pytest
from helpers import make_base, save_trained

from lit_llama.checkpoint import load_model
from lit_llama.common.errors import UserError
from lit_llama.generate.decode import generate, generate_batch
from lit_llama.generate.load import load_trained_folder
from lit_llama.generate.mixed import Mixer

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


def test_a_batch_of_all_methods_answers_as_each_alone_and_holds_the_base_once(tmp_path):
    base = make_base(tmp_path / "base")
    folders = [save_trained(base, tmp_path / name, method, **flags) for name, (method, flags) in FOLDERS.items()]
    tasks = [None, *folders, *folders[::-1], None]
    prompts = [[40 + (7 * i + j) % 90 for j in range(1 + (5 * i) % 9)] for i in range(len(tasks))]
    models = [load_model(base) if task is None else load_trained_folder(task)[0] for task in tasks]
    whole = [list(generate(model, prompt, 12, set())) for model, prompt in zip(models, prompts, strict=True)]
    stops = [{answer[1 + i % 2]} if i % 3 else set() for i, answer in enumerate(whole)]  # some rows end early
    alone = [list(generate(*row[:2], 12, row[2])) for row in zip(models, prompts, stops, strict=True)]

    model, passes = load_model(base), []
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    mixer = Mixer(model)
    for folder in folders:
        mixer.add(folder)
    model.transformer.ln_f.register_forward_hook(lambda *_: passes.append(1))
    assert generate_batch(model, mixer.assign(tasks, prompts), 12, stops) == alone
    assert len(passes) == 12  # one for the prompts, then one for each token, for all rows at once
    assert len({len(answer) for answer in alone}) > 1
    assert len({tuple(answer) for answer in whole}) > len(folders) // 2  # the folders do differ
    after = model.state_dict()
    assert all(after[name].data_ptr() == pointer for name, pointer in before.items())


def test_methods_that_change_the_base_are_refused(tmp_path):
    base = make_base(tmp_path / "base")
    folder = save_trained(base, tmp_path / "houlsby", "houlsby", bottleneck_size=2)
    with pytest.raises(UserError, match="houlsby.*can mix adapter, prefix, soft_prompt, lora"):
        Mixer(load_model(base)).add(folder)
