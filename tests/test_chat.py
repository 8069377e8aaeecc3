"""The chat without a terminal: what is fed to the model, what is answered, and what the commands do."""

import copy
import io
from contextlib import redirect_stdout
from unittest.mock import patch

import pytest
from helpers import CASES, make_base, save_trained

from lit_llama.checkpoint import load_model
from lit_llama.common.errors import UserError
from lit_llama.data.prompts import choose_template, stop_ids
from lit_llama.generate.chat import MIN_CACHE_SIZE, Chat, converse
from lit_llama.generate.stream import generate
from lit_llama.settings import Sampling
from lit_llama.tokenizer import Tokenizer

OVER_A_BASE = {case: CASES[case] for case in CASES if case != "full"}


@pytest.fixture(scope="module")
def trained_dirs(base, tmp_path_factory):
    folder, cases = tmp_path_factory.mktemp("chat"), OVER_A_BASE.items()
    return {case: save_trained(base, folder / case, method, **flags) for case, (method, flags) in cases}


def make_chat(folder, style=None, max_new_tokens=8, **options) -> Chat:
    tokenizer = Tokenizer(folder)
    return Chat(folder, load_model(folder), tokenizer, choose_template(style, tokenizer), max_new_tokens, **options)


@pytest.fixture
def chat(base):
    return make_chat(base)


def say(chat: Chat, text: str) -> str:
    return "".join(chat.ask(text))


def fresh_ids(chat: Chat, text: str) -> list[int]:
    """The answer's ids, with the whole conversation as one prompt to a copy of the model without a cache."""
    model = copy.deepcopy(chat.model)
    prompt = chat.encode([*chat.turns, {"role": "user", "content": text}])[len(model.virtual_ids) :]
    return list(generate(model, prompt, chat.max_new_tokens, stop_ids(chat.template, chat.tokenizer)))


@pytest.mark.parametrize("case", [None, *OVER_A_BASE])
@pytest.mark.parametrize("style", ["template", "alpaca"])
def test_cached_turns_are_answered_as_a_fresh_prompt_is(base, trained_dirs, case, style):
    chat = make_chat(base, style)
    if case:
        chat.load(str(trained_dirs[case]))
        chat.template = choose_template(style, chat.tokenizer)
    chat.system = "Be brief."
    for text in ("add 1 and 2", "and 3?", "why"):
        fresh = fresh_ids(chat, text)
        answer = say(chat, text)
        assert answer and chat.turns[-1]["ids"] == fresh and answer == chat.tokenizer.decode(fresh)
    assert len(chat.turns) == 6


def test_old_turns_are_not_read_again(chat, monkeypatch):
    counts, forward = [], chat.model.hidden_states  # how many tokens each pass reads
    monkeypatch.setattr(chat.model, "hidden_states", lambda idx, *a: (counts.append(idx.size(1)), forward(idx, *a))[1])
    first, second = (len(chat.encode([{"role": "user", "content": text}])) for text in ("a", "bb"))
    say(chat, "a")
    assert counts == [first] + [1] * (len(counts) - 1) and len(chat.turns[-1]["ids"]) > 1
    assert "\ufffd" in chat.turns[-1]["content"]  # encoding the text again would give other ids
    counts.clear()
    say(chat, "bb")
    # the answer's last token, which was chosen but never read, its end of turn and line feed, and the new turn
    assert counts[0] == 1 + 1 + len(chat.tokenizer.encode("\n")) + second and set(counts[1:]) == {1}


def test_the_oldest_turns_go_when_the_context_is_full(tmp_path, capsys):
    chat = make_chat(make_base(tmp_path / "base", block_size=160), max_new_tokens=16)
    chat.system = "Be brief."
    notes = 0
    for i in range(12):
        assert say(chat, f"{i} and {i}")
        assert len(chat.cached) <= 160
        if "context of 160 tokens is full: the oldest" in capsys.readouterr().out:
            notes += 1
            assert chat.turns[-2]["content"] == f"{i} and {i}" and len(chat.turns) < 2 * (i + 1)
    assert 1 < notes < 8  # half of the context is made free, so that most turns are cheap
    assert "system\nBe brief." in chat.tokenizer.decode(chat.encode(chat.turns))
    turns = list(chat.turns)
    with pytest.raises(UserError, match="the context has 160; shorten it"):
        say(chat, "x" * 200)
    assert chat.turns == turns  # a message that is too long costs nothing of the history
    assert say(chat, "still here?")


def test_the_cache_grows_with_the_conversation(tmp_path):
    chat = make_chat(make_base(tmp_path / "base", block_size=2 * MIN_CACHE_SIZE), max_new_tokens=4)
    say(chat, "a")
    assert chat.model.cache_size == MIN_CACHE_SIZE
    fresh = fresh_ids(chat, "b" * MIN_CACHE_SIZE)
    say(chat, "b" * MIN_CACHE_SIZE)
    assert chat.model.cache_size == 2 * MIN_CACHE_SIZE
    assert chat.turns[-1]["ids"] == fresh


def test_load_swaps_the_method_and_leaves_the_base_alone(chat, trained_dirs):
    before = {name: tensor.clone() for name, tensor in chat.base.state_dict().items()}
    alone = say(chat, "add 1 and 2")
    for case, folder in trained_dirs.items():
        assert CASES[case][0] in chat.command(f"/load {folder}") and say(chat, "add 1 and 2")
        shared = {t.data_ptr() for t in chat.base.parameters()} & {t.data_ptr() for t in chat.model.parameters()}
        assert len(shared) > 10  # the base is in memory once
    assert all(tensor.equal(before[name]) for name, tensor in chat.base.state_dict().items())
    chat.command("/load")
    assert say(chat, "add 1 and 2") == alone
    assert chat.model is chat.base


def test_load_starts_a_new_conversation_unless_asked_to_keep_it(chat, trained_dirs, tmp_path):
    say(chat, "a")
    assert "a new conversation" not in chat.command(f"/load --keep {trained_dirs['adapter']}")
    assert len(chat.turns) == 2
    say(chat, "b")
    assert len(chat.turns) == 4
    assert chat.command("/load --keep") == "tiny alone"
    other = save_trained(whole := make_base(tmp_path / "other", seed=2), tmp_path / "trained", "lora")
    (whole / "method.json").write_bytes((other / "method.json").read_bytes())  # as finetune/full.py does
    wrong = {tmp_path: "no finetune script wrote", other: "was trained on tiny", whole: "was trained on tiny"}
    for folder, message in wrong.items():
        with pytest.raises(UserError, match=message):
            chat.command(f"/load {folder}")
    assert len(chat.turns) == 4 and chat.model is chat.base
    assert chat.command(f"/load {trained_dirs['lora']}").endswith(" ms; a new conversation begins")
    assert chat.turns == []


def talk(chat: Chat, *lines: str) -> str:
    """What is printed in a conversation about some lines."""
    with redirect_stdout(io.StringIO()) as printed, patch("sys.stdin", io.StringIO("\n".join(lines))):
        converse(chat)
    return printed.getvalue()


def test_commands(chat, trained_dirs):
    load, no_file = f"/load --keep {trained_dirs['lora']}", f"/load {5000 * 'x'}"
    written = talk(chat, "/help", "/system Be kind", "", "hello", load, "/jump", no_file, "/quit", "never")
    assert "/load FOLDER" in written and "the system message is set" in written and "lora over tiny, in " in written
    assert "error: /jump is none of /system, /reset, /load, /help, /quit\nerror: " in written
    assert [turn["content"] for turn in chat.turns][0] == "hello" and len(chat.turns) == 2
    talk(chat, "/reset", "/system")
    assert chat.turns == [] and chat.system == ""


@pytest.mark.parametrize("n_tokens", [0, 2])
def test_ctrl_c_stops_the_answer_and_not_the_program(chat, n_tokens):
    """What there is of the answer is kept; a question without any is forgotten."""
    forward, calls = chat.model.hidden_states, iter(range(n_tokens))

    def interrupted(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return forward(*args)

    with patch.object(chat.model, "hidden_states", interrupted):
        assert "(stopped; /quit or Ctrl-D leaves)" in talk(chat, "first")
    assert [len(turn["ids"]) for turn in chat.turns[1:]] == ([2] if n_tokens else [])
    fresh = fresh_ids(chat, "second")
    say(chat, "second")
    assert chat.turns[-1]["ids"] == fresh


def test_sampled_turns_differ_but_a_chat_repeats(base):
    answers = []
    for _ in range(2):
        chat = make_chat(base, max_new_tokens=12, sampling=Sampling(temperature=1.0))
        answers += [say(chat, "a"), chat.command("/reset"), say(chat, "a")]
    assert answers[:3] == answers[3:] and answers[0] != answers[2]
