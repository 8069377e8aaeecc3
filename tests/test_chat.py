"""The chat without a terminal: what is fed to the model, what is answered, and what the commands do."""

import copy
import errno
import os
import signal
import sys

import pytest
import torch
from helpers import make_base, shake

from lit_llama.checkpoint import load_model
from lit_llama.cli import UserError
from lit_llama.common.files import save_tensors, write_json
from lit_llama.data.prompts import encode_prompt, stop_ids
from lit_llama.generate.chat import CACHE_STEP, Chat, converse, edit_lines, same_weights
from lit_llama.generate.decode import generate
from lit_llama.methods.table import METHODS
from lit_llama.settings import Sampling
from lit_llama.tokenizer import Tokenizer
from lit_llama.trained import METHOD_FILE, TRAINED_FILE, describe_base, kept_tensors

METHODS_OVER_A_BASE = {
    "adapter": dict(prompt_length=3, start_layer=1),
    "prefix": dict(prompt_length=4),
    "soft_prompt": dict(prompt_length=5),
    "lora": dict(r=2),
    "houlsby": dict(bottleneck_size=3),
    "adapter_v2": dict(prompt_length=3, start_layer=1),
    "output_layers": dict(n_blocks=1),
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture(scope="module")
def trained_dirs(base_dir):
    """A folder of each method, away from where it starts."""
    folders = {}
    for method, arguments in METHODS_OVER_A_BASE.items():
        model = load_model(base_dir).requires_grad_(False)
        METHODS[method](model, **arguments)
        shake(model)
        folders[method] = base_dir.parent / method
        save_tensors(folders[method] / TRAINED_FILE, kept_tensors(model))
        described = {
            "method": method,
            "arguments": arguments,
            "base": describe_base(base_dir),
            "prompt_style": "chatml",
        }
        write_json(folders[method] / METHOD_FILE, described)
    return folders


@pytest.fixture
def chat(base_dir):
    notes = []
    chat = Chat(base_dir, load_model(base_dir), Tokenizer(base_dir), "chatml", 8, notify=notes.append)
    chat.notes = notes
    return chat


def count_tokens(model, monkeypatch) -> list[int]:
    """How many tokens each pass through the model reads, from now on."""
    counts, forward = [], model.hidden_states

    def counted(idx, *args):
        counts.append(idx.size(1))
        return forward(idx, *args)

    monkeypatch.setattr(model, "hidden_states", counted)
    return counts


def say(chat: Chat, text: str) -> str:
    return "".join(chat.ask(text))


def fresh_ids(chat: Chat, text: str) -> list[int]:
    """The answer's ids, with the whole conversation as one prompt to a copy of the model without a cache."""
    asked = copy.copy(chat)
    asked.turns = [*chat.turns, {"role": "user", "content": text}]
    model = copy.deepcopy(chat.model)
    prompt = asked.encode(asked.turns)[len(model.virtual_ids) :]
    return list(generate(model, prompt, chat.max_new_tokens, stop_ids(chat.style, chat.tokenizer)))


@pytest.mark.parametrize("method", [None, *METHODS_OVER_A_BASE])
@pytest.mark.parametrize("style", ["chatml", "alpaca", "llama2"])
def test_cached_turns_are_answered_as_a_fresh_prompt_is(base_dir, trained_dirs, method, style):
    chat = Chat(base_dir, load_model(base_dir), Tokenizer(base_dir), style, 8)
    if method:
        chat.load(str(trained_dirs[method]))
        chat.style = style
    chat.set_system("Be brief.")
    answers = []
    for text in ("add 1 and 2", "and 3?", "why"):
        fresh = fresh_ids(chat, text)
        answer = say(chat, text)
        assert chat.turns[-1]["content"].ids == fresh and answer == chat.tokenizer.decode(fresh)
        answers.append(answer)
    assert len(chat.turns) == 6 and all(answers)


def test_old_turns_are_not_read_again(chat, monkeypatch):
    counts = count_tokens(chat.model, monkeypatch)
    tokenizer = chat.tokenizer
    say(chat, "a")
    first = len(encode_prompt([{"role": "user", "content": "a"}], "chatml", tokenizer))
    answered = len(chat.turns[-1]["content"].ids)
    assert counts == [first] + [1] * (len(counts) - 1)
    counts.clear()
    say(chat, "bb")
    turn = len(encode_prompt([{"role": "user", "content": "bb"}], "chatml", tokenizer))
    # the answer's last token, which was chosen but never read, its end of turn and line feed, and the new turn
    assert answered > 1 and counts[0] == 1 + len(tokenizer.encode("\n")) + 1 + turn
    assert set(counts[1:]) == {1}


def test_an_answer_keeps_its_own_ids(chat):
    """Bytes that are no character decode to U+FFFD, which encodes to other bytes."""
    chat.turns = []
    say(chat, "a")
    ids = chat.turns[1]["content"].ids
    encoded = chat.encode(chat.turns)
    assert any(encoded[i : i + len(ids)] == ids for i in range(len(encoded)))


def test_the_oldest_turns_go_when_the_context_is_full(tmp_path, monkeypatch):
    folder, notes = make_base(tmp_path / "base", block_size=160), []
    chat = Chat(folder, load_model(folder), Tokenizer(folder), "chatml", 16, notify=notes.append)
    chat.set_system("Be brief.")
    counts = count_tokens(chat.model, monkeypatch)
    for i in range(12):
        counts.clear()
        before = len(notes)
        assert say(chat, f"{i} and {i}")
        assert len(chat.cached) <= 160
        if len(notes) > before:
            assert "context of 160 tokens is full: the oldest" in notes[-1]
            assert chat.turns[-2]["content"] == f"{i} and {i}" and len(chat.turns) < 2 * (i + 1)
    assert 1 < len(notes) < 8  # half of the context is made free, so that most turns are cheap
    assert "system\nBe brief." in chat.tokenizer.decode(chat.encode(chat.turns))
    turns = list(chat.turns)
    with pytest.raises(UserError, match="the context has 160; shorten it"):
        say(chat, "x" * 200)
    assert chat.turns == turns  # a message that is too long costs nothing of the history
    assert say(chat, "still here?")


def test_the_cache_grows_with_the_conversation(tmp_path):
    folder = make_base(tmp_path / "base", block_size=2 * CACHE_STEP)
    chat = Chat(folder, load_model(folder), Tokenizer(folder), "chatml", 4)
    say(chat, "a")
    assert chat.model.cache_size == CACHE_STEP
    fresh = fresh_ids(chat, "b" * CACHE_STEP)
    say(chat, "b" * CACHE_STEP)
    assert chat.model.cache_size == 2 * CACHE_STEP
    assert chat.turns[-1]["content"].ids == fresh


@pytest.mark.parametrize("method", METHODS_OVER_A_BASE)
def test_load_swaps_the_method_and_leaves_the_base_alone(chat, trained_dirs, method):
    bytes_before = {name: tensor.clone() for name, tensor in chat.base.state_dict().items()}
    alone = say(chat, "add 1 and 2")
    assert method in chat.load(str(trained_dirs[method]))
    chat.reset()
    fresh = fresh_ids(chat, "add 1 and 2")
    say(chat, "add 1 and 2")
    assert chat.turns[-1]["content"].ids == fresh
    shared = {t.data_ptr() for t in chat.base.parameters()} & {t.data_ptr() for t in chat.model.parameters()}
    assert len(shared) > 10  # the base is there once
    for name, tensor in chat.base.state_dict().items():
        assert torch.equal(tensor, bytes_before[name]), name
    chat.load("")
    chat.reset()
    assert say(chat, "add 1 and 2") == alone
    assert chat.model is chat.base


def test_load_starts_a_new_conversation_unless_asked_to_keep_it(chat, trained_dirs):
    say(chat, "a")
    assert "a new conversation" not in chat.command(f"/load --keep {trained_dirs['adapter']}")
    assert len(chat.turns) == 2
    say(chat, "b")
    assert len(chat.turns) == 4
    assert chat.command("/load --keep") == "tiny alone"
    with pytest.raises(UserError):
        chat.command("/load nothing")
    assert len(chat.turns) == 4 and chat.model is chat.base
    assert chat.command(f"/load {trained_dirs['lora']}").endswith(" ms; a new conversation begins")
    assert chat.turns == []


def test_a_command_that_fails_does_not_end_the_chat(chat, monkeypatch):
    def closed(folder):
        raise PermissionError(errno.EACCES, "Permission denied", "closed/method.json")

    monkeypatch.setattr("lit_llama.generate.chat.read_method", closed)
    written = talk(chat, "/load closed", "hello")
    assert written.startswith("error: closed/method.json: Permission denied\n")
    assert len(chat.turns) == 2


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX terminal")
def test_pasted_lines_are_one_turn():
    import pty

    readline = pytest.importorskip("readline")
    if "libedit" in readline.__doc__:
        pytest.skip("libedit knows no bracketed paste")
    child, terminal = pty.fork()
    if child == 0:
        signal.alarm(20)  # rather than wait for ever
        sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")
        edit_lines()
        print("read", [input("> "), input("> ")], flush=True)
        os._exit(0)
    os.write(terminal, b"\x1b[200~one\rtwo\rthree\x1b[201~\rfour\r")
    seen = b""
    while b"read [" not in seen:
        seen += os.read(terminal, 1000)
    os.waitpid(child, 0)
    assert b"read ['one\\ntwo\\nthree', 'four']" in seen


def test_load_refuses_what_does_not_fit(chat, tmp_path, trained_dirs):
    with pytest.raises(UserError, match="no finetune script wrote"):
        chat.load(str(tmp_path))
    other = make_base(tmp_path / "other", seed=2)
    chat.checkpoint_dir = other
    with pytest.raises(UserError, match="trained on another base, tiny"):
        chat.load(str(trained_dirs["lora"]))


def test_same_weights_shares_them(base_dir):
    base = load_model(base_dir)
    twin = same_weights(base)
    assert all(one.data_ptr() == two.data_ptr() for one, two in zip(base.parameters(), twin.parameters(), strict=True))
    assert all(one is not two for one, two in zip(base.parameters(), twin.parameters(), strict=True))


class Lines:
    """Lines to read; an exception among them is raised."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self) -> str:
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


def talk(chat: Chat, *lines, write=None) -> str:
    written = []
    converse(chat, Lines(*lines), write or written.append)
    return "".join(written)


def test_commands(chat, trained_dirs):
    written = talk(
        chat, "/help", "/system Be kind", "", "hello", f"/load --keep {trained_dirs['lora']}", "/jump", "/quit", "never"
    )
    assert "/load FOLDER" in written and "the system message is set" in written and "lora over tiny, in " in written
    assert "error: /jump is none of /system, /reset, /load, /help, /quit" in written
    assert [turn["content"] for turn in chat.turns][0] == "hello" and len(chat.turns) == 2
    talk(chat, "/reset", "/system")
    assert chat.turns == [] and chat.system == []


def test_ctrl_c_stops_the_answer_and_not_the_program(chat):
    pieces = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    talk(chat, "first", "second", KeyboardInterrupt(), write=write)
    assert pieces[2].startswith("\n(stopped")
    assert [turn["content"] for turn in chat.turns[::2]] == ["first", "second"]
    assert chat.turns[1]["content"] == "".join(pieces[:2])  # what was said until then
    second = chat.turns[3]["content"].ids
    del chat.turns[2:]
    assert second == fresh_ids(chat, "second")


def test_a_question_stopped_before_its_answer_is_forgotten(chat, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat.model, "hidden_states", stop)
        assert "(stopped" in talk(chat, "first")
    assert chat.turns == []
    assert say(chat, "again")


def test_sampled_turns_differ_but_a_chat_repeats(base_dir):
    def twice() -> list[str]:
        sampling = Sampling(temperature=1.0)
        chat = Chat(base_dir, load_model(base_dir), Tokenizer(base_dir), "chatml", 12, sampling)
        answers = [say(chat, "a")]
        chat.reset()
        return [*answers, say(chat, "a")]

    one, two = twice(), twice()
    assert one == two and one[0] != one[1]


@pytest.mark.weights
def test_the_real_model_remembers_what_was_said(smollm2_dir, monkeypatch):
    chat = Chat(smollm2_dir, load_model(smollm2_dir), Tokenizer(smollm2_dir), "chatml", 24)
    counts = count_tokens(chat.model, monkeypatch)
    assert say(chat, "What is the capital of France?") == "The capital of France is Paris."
    messages = [*chat.turns, {"role": "user", "content": "And of Italy?"}]
    prompt = encode_prompt(messages, "chatml", chat.tokenizer)  # from the texts alone
    model = load_model(smollm2_dir)
    fresh = list(generate(model, prompt, 24, stop_ids("chatml", chat.tokenizer)))
    counts.clear()
    assert say(chat, "And of Italy?") == chat.tokenizer.decode(fresh)
    assert counts[0] < len(prompt) // 2
    assert "Rome" in chat.turns[-1]["content"]
