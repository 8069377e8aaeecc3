"""A conversation in the model's own chat style. The keys and values of earlier turns stay in the cache.

        turn 1   [system][user 1][answer 1]                       read: all of it
        turn 2   [system][user 1][answer 1][user 2][answer 2]     read: the end of answer 1, user 2, answer 2
                  `---- in the cache already ----'

Each turn encodes the whole conversation again, and reuses the cache up to the first id that differs: usually all
earlier turns, but none after /system, /load, or after the oldest turns were dropped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path

import torch

from lit_llama.checkpoint import MODEL_FILE, load_model
from lit_llama.common.errors import UserError
from lit_llama.data.prompts import Message, encode_prompt, stop_ids, trained_template
from lit_llama.devices.blocks import unwrap_blocks, wrap_blocks
from lit_llama.devices.inference import NextLogits
from lit_llama.generate.load import add_trained, is_classifier
from lit_llama.generate.stream import decode, stream_text
from lit_llama.methods.table import weightless
from lit_llama.model import LLaMA
from lit_llama.settings import Sampling
from lit_llama.tokenizer import Tokenizer
from lit_llama.trained import METHOD_FILE, check_base, read_method

MIN_CACHE_SIZE = 1024  # slots; the whole context of a long one may not fit in memory

HELP = """\
/system TEXT   set the system message, such as a role; without TEXT, remove it
/reset         start a new conversation
/load FOLDER   load a trained folder over the same base, or without FOLDER the base alone, and start a new
               conversation; /load --keep FOLDER keeps this one
/help          this list
/quit          leave; so does Ctrl-D
Ctrl-C stops an answer."""


class Chat:
    """A model, the messages so far, and which ids the KV cache holds."""

    def __init__(
        self,
        checkpoint_dir: Path | str,
        base: LLaMA,
        tokenizer: Tokenizer,
        template: str,
        max_new_tokens: int = 512,
        sampling: Sampling = Sampling(),
        compile: bool = False,
    ) -> None:
        self.checkpoint_dir, self.base, self.tokenizer = checkpoint_dir, base.requires_grad_(False), tokenizer
        self.base_template, self.max_new_tokens, self.compile = template, max_new_tokens, compile
        self.sampling = sampling
        self.generator = torch.Generator(base.transformer.wte.weight.device).manual_seed(sampling.seed)
        self.system = ""
        self.turns: list[Message] = []
        self.model = base
        self.use(base, template)

    def use(self, model: LLaMA, template: str) -> None:
        """Answer with ``model`` from now on. The messages so far stay."""
        self.model.clear_kv_cache()
        unwrap_blocks(model)
        wrap_blocks(model, self.compile, packed=False)
        self.model, self.template = model.eval(), template
        self.cached: list[int] = []  # the ids whose keys and values are in the cache

    def ask(self, text: str) -> Generator[str]:
        """The answer in parts as they come. A stopped answer is kept; if it is empty, the question is dropped.

        Raises UserError if the question is longer than the context.
        """
        self.turns.append({"role": "user", "content": text})
        answer: list[int] = []
        try:
            ids, n_new = self.fit_history()
            cached = self.reuse_cache(ids, len(ids) + n_new)
            stop, step = stop_ids(self.template, self.tokenizer), NextLogits(self.model)
            tokens = decode(self.model, ids, cached, n_new, stop, self.sampling, self.generator, step)
            yield from stream_text(self.tokenizer, tokens, answer)
        finally:
            if answer:
                self.cached = ids + answer[:-1]  # the model has not read the last one yet
                content = self.tokenizer.decode(answer)  # encoded again, it may give other ids
                self.turns.append({"role": "assistant", "content": content, "ids": answer})
            else:
                self.turns.pop()

    def encode(self, turns: list[Message]) -> list[int]:
        """The ids of a conversation up to where the next answer begins."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*self.model.virtual_ids, *encode_prompt(system + turns, self.template, self.tokenizer)]

    def fit_history(self) -> tuple[list[int], int]:
        """The ids of the conversation, and how many tokens its answer may have.

        If a whole answer does not fit, the oldest turns are dropped until half of the context is free: every time,
        the rest must be read again, so this should be rare. Raises UserError if the last message alone is too long.
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
            print(f"(the context of {context} tokens is full: the oldest {dropped} turns are forgotten)")
            self.turns = turns
        return ids, min(self.max_new_tokens, context - len(ids))

    def reuse_cache(self, ids: list[int], slots: int) -> int:
        """Make sure that the cache has ``slots``, and return how many of ``ids`` it holds, never all of them."""
        if slots > self.model.cache_size:
            self.cached = []
            self.model.set_kv_cache(1, min(max(2 * slots, MIN_CACHE_SIZE), self.model.context))
        same = [one == other for one, other in zip(self.cached, ids[:-1], strict=False)]
        n_same = same.index(False) if False in same else len(same)
        self.cached = ids[:n_same]
        return n_same

    def command(self, line: str) -> str:
        """Run a command such as "/load out/my", and return what to print. Raises UserError or OSError if it fails."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/help":
            return HELP
        if name == "/system":
            self.system = argument
            return "the system message is set" if argument else "no system message"
        if name == "/reset":
            self.turns = []
            return "a new conversation begins"
        if name == "/load":
            option, _, folder = argument.partition(" ")
            if option == "--keep":
                return self.load(folder.strip())
            loaded, self.turns = self.load(argument), []  # old answers would be examples for the new model
            return f"{loaded}; a new conversation begins"
        raise UserError(f"{name} is none of /system, /reset, /load, /help, /quit")

    def load(self, folder: str) -> str:
        """Answer with the method in ``folder`` over the loaded base, or with the base alone if ``folder`` is ""."""
        started = time.perf_counter()
        if not folder:
            self.use(self.base, self.base_template)
            return f"{self.base.config.name} alone"
        method = read_method(folder)
        if is_classifier(method):
            raise UserError(f"{folder} answers with labels: ask it with generate/classify.py")
        check_base(method["base"], self.checkpoint_dir, Path(folder) / METHOD_FILE)
        if (Path(folder) / MODEL_FILE).exists():
            device = self.base.transformer.wte.weight.device
            model = load_model(folder, self.base.dtype, device).requires_grad_(False)
        else:
            model = weightless(self.base.config)  # shares the base's tensors: what is added to it leaves the base alone
            model.load_state_dict(self.base.state_dict(), assign=True)
            model.tie_weights()
            add_trained(model, folder, method)
        self.use(model, trained_template(method, self.tokenizer))
        milliseconds = 1000 * (time.perf_counter() - started)
        return f"{method['method']} over {method['base']['name']}, in {milliseconds:.0f} ms"


def converse(chat: Chat) -> None:
    """Read lines and print answers until /quit or the end of input. Ctrl-C stops an answer or clears a line."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        print(f"{chat.base.config.name}; /help for help")
        with suppress(ImportError):  # on Windows, whose terminal edits and recalls
            import readline  # it lets ``input`` edit and recall lines, and take several pasted ones as one

            readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            line = input("> " if on_terminal else "").strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                print(chat.command(line))
            elif line:
                with closing(chat.ask(line)) as answer:
                    for text in answer:
                        print(text, end="", flush=True)
                print()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(stopped; /quit or Ctrl-D leaves)")
        except (UserError, OSError) as error:
            print(f"error: {error}")
