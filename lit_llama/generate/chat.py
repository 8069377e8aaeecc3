"""A conversation: turns in the model's own chat style, with the keys and values of old turns kept in the cache.

        turn 1   [system][user 1][answer 1]                       fed: all of it, token by token from the answer on
        turn 2   [system][user 1][answer 1][user 2][answer 2]     fed: the end of answer 1, user 2, answer 2
                  `---- in the cache already ----'

The ids of the whole conversation are put together again for every turn, and the cache serves as far as they begin as it
does: all of the old turns as a rule, and nothing after /system, /load, or when the oldest turns had to go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path

import torch

from lit_llama.checkpoint import MODEL_FILE, fingerprint, load_model
from lit_llama.cli import UserError, describe
from lit_llama.data.prompts import STYLES, Control, Message, encode_control, stop_ids
from lit_llama.devices.blocks import unwrap_blocks, wrap_blocks
from lit_llama.generate.classify import is_classifier
from lit_llama.generate.decode import decode, stream_text
from lit_llama.generate.load import add_trained
from lit_llama.model import LLaMA
from lit_llama.settings import Sampling
from lit_llama.tokenizer import Tokenizer
from lit_llama.trained import read_method

CACHE_STEP = 1024  # the cache grows by these many slots: the whole context of a long one may not fit in memory

HELP = """\
/system TEXT   say who the model is to be; without TEXT nobody in particular
/reset         forget the conversation
/load FOLDER   load what a finetune script wrote over the same base, or without FOLDER the base alone, and start a
               new conversation; /load --keep FOLDER keeps this one
/help          this list
/quit          leave; so does Ctrl-D
Ctrl-C stops an answer."""


class Answer(str):
    """An answer's text that remembers its ids: encoding the text again need not give the same ones."""

    ids: list[int]


class Chat:
    """A model, the messages so far, and the cache. ``notify`` is told what happens to the history."""

    def __init__(
        self,
        checkpoint_dir: Path,
        base: LLaMA,
        tokenizer: Tokenizer,
        style: str,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        notify: Callable[[str], None] = print,
        compile: bool = False,
    ) -> None:
        self.checkpoint_dir, self.base, self.tokenizer = checkpoint_dir, base.requires_grad_(False), tokenizer
        self.base_style, self.max_new_tokens, self.notify = style, max_new_tokens, notify
        self.sampling = sampling or Sampling()
        self.generator = torch.Generator(base.transformer.wte.weight.device).manual_seed(self.sampling.seed)
        self.system: list[Message] = []
        self.turns: list[Message] = []
        self.model, self.compile = base, compile
        self.use(base, style)

    @cached_property
    def base_fingerprint(self) -> str:
        return fingerprint(self.checkpoint_dir)

    def use(self, model: LLaMA, style: str) -> None:
        """Answer with ``model`` from now on; the messages so far stay."""
        self.model.clear_kv_cache()
        unwrap_blocks(model)
        wrap_blocks(model, self.compile)
        self.model, self.style = model.eval(), style
        self.cached: list[int] = []  # the ids whose keys and values the cache holds

    # what is said

    def ask(self, text: str) -> Generator[str]:
        """The answer in pieces of text, as it comes; what there is of it stays, should it be stopped.

        A question to which nothing was said is forgotten. UserError for one that is longer than the context.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            ids, room = self.fit_history()
            cached = self.reuse_cache(ids, len(ids) + room)
        except BaseException:  # Ctrl-C, too
            self.turns.pop()
            raise
        answer: list[int] = []
        stop = stop_ids(self.style, self.tokenizer)

        def kept() -> Iterator[int]:
            for token in decode(self.model, ids, cached, room, stop, self.sampling, self.generator):
                answer.append(token)
                self.cached = ids + answer[:-1]  # the last one was chosen, not fed
                yield token

        try:
            yield from stream_text(self.tokenizer, kept())
        finally:
            if answer:
                message = Answer(self.tokenizer.decode(answer))
                message.ids = answer
                self.turns.append({"role": "assistant", "content": message})
            else:
                self.turns.pop()

    def encode(self, turns: list[Message]) -> list[int]:
        """The ids of a conversation up to where the next answer begins."""
        ids = list(self.model.virtual_ids)
        for piece, _ in STYLES[self.style](self.system + turns):
            if isinstance(piece, Answer):
                ids += piece.ids
            elif isinstance(piece, Control):
                ids += encode_control(piece, self.tokenizer)
            else:
                ids += self.tokenizer.encode(piece)
        return ids

    def fit_history(self) -> tuple[list[int], int]:
        """The conversation's ids, and the number of tokens that its answer may have.

        Where there is no room for a whole answer the oldest turns go, down to half of the context: every time they do,
        what is left must be read again, so it should not be every turn. UserError where the last message is too long.
        """
        context, turns = self.model.context, self.turns
        ids = self.encode(turns)
        if len(ids) + self.max_new_tokens > context:
            while len(ids) > context // 2 and len(turns) > 1:
                turns = turns[2:]  # a question and its answer
                ids = self.encode(turns)
        if len(ids) >= context:
            raise UserError(f"this message makes {len(ids)} tokens, and the context has {context}; shorten it")
        if dropped := (len(self.turns) - len(turns)) // 2:
            self.notify(f"the context of {context} tokens is full: the oldest {dropped} turns are forgotten")
            self.turns = turns
        return ids, min(self.max_new_tokens, context - len(ids))

    def reuse_cache(self, ids: list[int], slots: int) -> int:
        """Make room for ``slots`` in the cache, and return how many of ``ids`` it holds."""
        same = (one == other for one, other in zip(self.cached, ids[:-1], strict=False))
        cached = next((i for i, equal in enumerate(same) if not equal), min(len(self.cached), len(ids) - 1))
        self.cached = ids[:cached]
        if slots > self.model.cache_size:
            old = [block.attn.kv_cache for block in self.model.transformer.h]
            size = min(-(-slots // CACHE_STEP) * CACHE_STEP, self.model.context)
            with torch.inference_mode():
                self.model.set_kv_cache(1, size)
                for block, before in zip(self.model.transformer.h, old, strict=True):
                    if before is not None:
                        now = block.attn.kv_cache
                        now.k[:, :, : before.k.size(2)], now.v[:, :, : before.v.size(2)] = before.k, before.v
                        now.prompt = before.prompt
        return cached

    # commands

    def command(self, line: str) -> str:
        """Do what a line with a slash says, and return what to tell. UserError where it says nothing known."""
        name, _, argument = line.partition(" ")
        commands: dict[str, Callable[[str], str]] = {
            "/system": self.set_system,
            "/reset": self.reset,
            "/load": self.swap,
            "/help": lambda _: HELP,
        }
        if name not in commands:
            raise UserError(f"{name} is none of {', '.join(commands)}, /quit")
        try:
            return commands[name](argument.strip())
        except OSError as error:
            raise UserError(describe(error)) from None

    def set_system(self, text: str) -> str:
        self.system = [{"role": "system", "content": text}] if text else []
        return "the system message is set" if text else "no system message"

    def reset(self, _: str = "") -> str:
        self.turns = []
        return "the conversation starts again"

    def swap(self, argument: str) -> str:
        """Load a folder and start a new conversation, because old answers would be examples for the new model.

        With --keep in front the conversation stays.
        """
        option, _, rest = argument.partition(" ")
        if option == "--keep":
            return self.load(rest.strip())
        loaded, self.turns = self.load(argument), []
        return f"{loaded}; a new conversation begins"

    def load(self, folder: str) -> str:
        """Answer with what ``folder`` holds, over the base that is loaded already; "" goes back to the base."""
        started = time.perf_counter()
        if not folder:
            self.use(self.base, self.base_style)
            return f"{self.base.config.name} alone"
        method = read_method(Path(folder))
        if is_classifier(method):
            raise UserError(f"{folder} answers with labels: ask it with generate/classify.py")
        if (Path(folder) / MODEL_FILE).exists():
            weight = self.base.transformer.wte.weight
            model = load_model(Path(folder), self.base.dtype, str(weight.device)).requires_grad_(False)
        else:
            if method["base"]["fingerprint"] != self.base_fingerprint:
                name = method["base"]["name"]
                raise UserError(f"{folder} was trained on another base, {name}: begin a chat over that one")
            model = same_weights(self.base)
            add_trained(model, Path(folder), method)
        self.use(model, method["prompt_style"])
        seconds = time.perf_counter() - started
        return f"{method['method']} over {method['base']['name']}, in {1000 * seconds:.0f} ms"


def same_weights(base: LLaMA) -> LLaMA:
    """Another model over the tensors of ``base``, none of them copied: what is added to it, the base does not see."""
    with torch.device("meta"):
        model = LLaMA(base.config)
    model.load_state_dict(base.state_dict(), assign=True)
    model.tie_weights()
    return model


def edit_lines() -> None:
    """Let ``input`` edit a line, recall earlier ones, and take several pasted lines as one, where it can."""
    try:
        import readline
    except ImportError:  # on Windows the terminal edits and recalls
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # GNU's; libedit ignores it


def converse(chat: Chat, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Read lines and write answers until /quit or the end of input; Ctrl-C stops an answer, and clears a line."""
    while True:
        try:
            line = read().strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                write(chat.command(line) + "\n")
            elif line:
                with closing(chat.ask(line)) as answer:
                    for text in answer:
                        write(text)
                write("\n")
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n(stopped; /quit or Ctrl-D leaves)\n")
        except UserError as error:
            write(f"error: {error}\n")
