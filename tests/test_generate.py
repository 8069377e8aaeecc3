"""Sampling, stopping, streaming, and batches, also over several trained folders: answers as of each prompt alone."""

import pytest
import torch
from helpers import greedy, make_base, save_trained, tiny_model

from lit_llama.checkpoint import load_model
from lit_llama.common.errors import UserError
from lit_llama.data.prompts import CHATML
from lit_llama.data.samples import Sample
from lit_llama.generate.decode import Sampling, generate_batch, next_token
from lit_llama.generate.load import load_trained_folder
from lit_llama.generate.mixed import Mixer
from lit_llama.generate.stream import generate, stream_text
from lit_llama.tokenizer import Tokenizer
from lit_llama.train.evaluate import answer_samples

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]


def test_an_answer_ends_at_a_stop_token_alone_and_in_a_batch():
    model = tiny_model().eval()
    whole = [greedy(model, prompt, 12) for prompt in PROMPTS]
    stop = {whole[0][2], whole[1][1], whole[3][3]}
    expected = [row[: next((i for i, token in enumerate(row) if token in stop), 12)] for row in whole]
    assert [list(generate(model, prompt, 12, stop)) for prompt in PROMPTS] == expected
    assert generate_batch(model, PROMPTS, 12, stop) == expected


def test_answers_to_samples_do_not_depend_on_the_batch_size_in_float32(tmp_path):
    base = make_base(tmp_path / "base", block_size=96)
    model, tokenizer = load_model(base), Tokenizer(base)
    texts = [chr(97 + i) * (1 + 37 * i % 57) for i in range(11)]  # next to the longest, 24 tokens do not fit
    samples = [Sample("", [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]) for text in texts]
    alone, *batched = (answer_samples(model, tokenizer, CHATML, samples, 24, size) for size in (1, 3, 8, 11))
    assert all(answers == alone for answers in batched)
    assert len({len(answer) for answer in alone}) > 1


def test_the_cache_is_gone_and_the_mode_is_back_afterwards():
    model = tiny_model().train()
    for _ in generate(model, [1, 2], 5, stop=set()):
        assert model.cache_size and not model.training
        break
    generate_batch(model, PROMPTS, 3, stop=set())
    assert not model.cache_size and model.training


def test_temperature_top_k_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)

    def seen(**how):
        tokens = next_token(logits, Sampling(**how), torch.Generator().manual_seed(0))
        return (torch.bincount(tokens, minlength=4) / 4000).tolist()

    one, two, top_2 = logits[0].softmax(-1).tolist(), (logits[0] / 2).softmax(-1).tolist(), logits[0, :2].softmax(-1)
    assert seen(temperature=0) == seen(temperature=1.0, top_p=0.01) == [1, 0, 0, 0]
    assert seen(temperature=1.0) == seen(temperature=1.0, top_k=99) == pytest.approx(one, abs=0.03)
    assert seen(temperature=2.0) == pytest.approx(two, abs=0.03)
    for how in (dict(top_k=2), dict(top_p=0.7)):
        assert seen(temperature=1.0, **how) == pytest.approx([*top_2.tolist(), 0, 0], abs=0.03)


def test_a_seed_repeats_an_answer_and_another_changes_it():
    model = tiny_model().eval()
    answers = [tuple(generate(model, [1], 20, set(), Sampling(1.0, seed=seed))) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_the_whole_context_can_be_used_and_more_is_refused_before_the_first_token():
    model = tiny_model().eval()
    assert list(generate(model, [1] * 60, 4, stop=set())) == greedy(model, [1] * 60, 4)
    model.transformer.wte.register_forward_hook(lambda *_: pytest.fail("the model was called"))
    for prompt, new in (([1] * 60, 5), ([1] * 70, 1), ([], 5), ([1], 0)):
        with pytest.raises(UserError):
            list(generate(model, prompt, new, stop=set()))
        with pytest.raises(UserError):
            generate_batch(model, [prompt, [1]], new, stop=set())
    with pytest.raises(UserError, match="60 tokens and max_new_tokens 5 .* context of 64 .* from 1 to 4"):
        list(generate(model, [1] * 60, 5, stop=set()))


def test_streaming_waits_for_whole_characters(tokenizer):
    ids = tokenizer.encode("aé→🙂b")  # one for each byte
    assert list(stream_text(tokenizer, iter(ids), [])) == ["a", "é", "→", "🙂", "b"]
    assert list(stream_text(tokenizer, iter(ids[:-2]), [])) == ["a", "é", "→", "\ufffd"]
    assert list(stream_text(tokenizer, iter([]), [])) == []


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


def test_a_batch_of_all_methods_answers_as_each_alone_and_holds_the_base_once(base, tmp_path):
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


def test_methods_that_change_the_base_are_refused(base, tmp_path):
    folder = save_trained(base, tmp_path / "houlsby", "houlsby", bottleneck_size=2)
    with pytest.raises(UserError, match="houlsby.*can mix adapter, prefix, soft_prompt, lora"):
        Mixer(load_model(base)).add(folder)
