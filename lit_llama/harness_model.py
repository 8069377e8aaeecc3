"""A base or a trained folder as EleutherAI's evaluation harness asks it (extra "eval"; the command is harness.py).

The harness asks for the log-probability of a text after another, for that of a whole text, and for answers up to a stop
string (https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/model_guide.md). Texts are tokenized as its
own class for Hugging Face's models does, so that figures can be set beside published ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from lit_llama.answerer import load_answerer
from lit_llama.classify import is_classifier
from lit_llama.cli import UserError
from lit_llama.devices import base_dtype, default_device
from lit_llama.generate import Sampling, generate_batch
from lit_llama.model import LLaMA
from lit_llama.prompts import STYLES, Control, chat_template, encode_control, stop_ids
from lit_llama.tokenizer import Tokenizer
from lit_llama.trained import read_method

MARK = "\0"  # around the name of a control token in a chat's text; without it such a name is text like any other
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # what tasks call the longest answer


class HarnessModel(TemplateLM):
    """``style`` is the prompt style of chats; ``batch_size`` texts are evaluated together."""

    def __init__(self, model: LLaMA, tokenizer: Tokenizer, style: str, batch_size: int = 16) -> None:
        super().__init__()
        self.model, self.tokenizer, self.style, self.batch_size = model.eval(), tokenizer, style, batch_size
        self.controls = set(tokenizer.backend.controls.values())
        self._device = model.transformer.wte.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that has nothing before it."""
        named = (self.tokenizer.bos_id, self.tokenizer.named_id("bos"), self.tokenizer.eos_id)
        return next(token_id for token_id in named if token_id is not None)

    @property
    def max_length(self) -> int:
        """Tokens of text that fit beside what the method puts in front."""
        return self.model.text_room

    # text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The ids of a text, a chat's control tokens among them; by default the beginning of sequence in front."""
        ids: list[int] = []
        for i, part in enumerate(string.split(MARK)):
            control = self.tokenizer.control_id(part) if i % 2 else None
            ids += self.tokenizer.encode(part) if control is None else [control]
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return ids if add_special_tokens is False or ids[: len(bos)] == bos else bos + ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as text in the prompt style; without ``add_generation_prompt`` the last one is left open."""
        pieces = [piece for piece, _ in STYLES[self.style](chat_history)]
        while not add_generation_prompt and pieces[-1] != chat_history[-1]["content"]:
            pieces.pop()
        return "".join(self.piece_text(piece) for piece in pieces)

    def piece_text(self, piece: str) -> str:
        if not isinstance(piece, Control):
            return piece.replace(MARK, "")
        return "".join(f"{MARK}{self.tokenizer.token(i)}{MARK}" for i in encode_control(piece, self.tokenizer))

    def chat_template(self, chat_template_name: bool | str = False) -> str:
        """What the harness writes beside its results."""
        return (chat_template(self.tokenizer, self.style) or "") if chat_template_name else ""

    @property
    def tokenizer_name(self) -> str:
        return f"{self.model.config.name}-{self.style}"

    # log-probabilities

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """For each (name, context, continuation): the log-probability, and whether greedy decoding would say it."""
        texts = [(context + target)[-(self.max_length + 1) :] for _, context, target in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for rows in self.batches(texts, "log-probabilities", disable_tqdm):
            hidden = self.hidden_states([texts[i][:-1] for i in rows])
            for vectors, i in zip(hidden, rows, strict=True):
                end = len(texts[i]) - 1  # a vector is about the token after its own
                start = max(0, end - len(requests[i][2]))
                target = torch.tensor(texts[i][start + 1 :], dtype=torch.long, device=self.device)
                logits = self.model.lm_head(vectors[start:end]).float().log_softmax(-1)  # (tokens, V)
                greedy = bool((logits.argmax(-1) == target).all())
                results[i] = logits.gather(1, target[:, None]).sum().item(), greedy
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return results

    def hidden_states(self, texts: list[list[int]]) -> Tensor:
        """-> (B, T, C), padded at the right, without what the method puts in front."""
        width, virtual = max(1, *map(len, texts)), self.model.virtual_ids
        idx = torch.tensor([virtual + ids + [0] * (width - len(ids)) for ids in texts], device=self.device)
        return self.model.hidden_states(idx)[:, len(virtual) :]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, each cut into windows of the context's length."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, target in map(make_disjoint_window, cut):
                windows.append((None, context, target))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[i] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    # answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each context, which ends before the first of its stop strings."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for settings, members in groups.items():
            until, max_new_tokens, sampling = read_settings(json.loads(settings))
            room = self.max_length - max_new_tokens
            if room < 1:
                raise UserError(f"answers of {max_new_tokens} tokens do not fit the context of {self.max_length}")
            prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in members]
            ends, ended = stop_ids(self.style, self.tokenizer), self.ends_with(until)
            for rows in self.batches(prompts, "answers", disable_tqdm):
                asked = [prompts[row] for row in rows]
                said = generate_batch(self.model, asked, max_new_tokens, ends, sampling, ended)
                for row, ids in zip(rows, said, strict=True):
                    request = requests[members[row]]
                    answers[members[row]] = cut_before(self.plain_text(ids), until)
                    self.cache_hook.add_partial("generate_until", request.args, answers[members[row]])
        return answers

    def ends_with(self, until: list[str]) -> Callable[[list[int]], bool]:
        """Whether the last token of an answer completes a stop string: a token is a byte at least.

        One token more is looked at, for decoding may drop a space at the start.
        """
        longest = max((len(stop.encode()) for stop in until), default=0) + 1
        return lambda ids: any(stop in self.plain_text(ids[-longest:]) for stop in until)

    def plain_text(self, ids: list[int]) -> str:
        """An answer without control tokens."""
        return self.tokenizer.decode(i for i in ids if i not in self.controls)

    def batches(self, texts: list[list[int]], name: str, disable_tqdm: bool) -> Iterator[list[int]]:
        """The indices of texts of similar lengths, the longest first: if memory is short it shows at once."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        hidden = disable_tqdm or not sys.stderr.isatty()
        with tqdm(total=len(texts), desc=name, unit="text", disable=hidden, dynamic_ncols=True) as bar:
            for start in range(0, len(order), self.batch_size):
                yield order[start : start + self.batch_size]
                bar.update(len(order[start : start + self.batch_size]))


def read_settings(settings: dict) -> tuple[list[str], int, Sampling]:
    """A task's generation settings: stop strings, the longest answer, and how tokens are chosen."""
    settings = dict(settings)
    until = settings.pop("until", None) or []
    lengths = [settings.pop(name) for name in LENGTHS if name in settings]
    sampled, temperature = settings.pop("do_sample", None), settings.pop("temperature", None)
    sampling = {name: settings.pop(name, None) for name in ("top_k", "top_p")}
    if settings:
        raise UserError(f"the task asks for generation settings that are not known here: {settings}")
    if sampled is None:
        sampled = bool(temperature)
    greedy = not sampled or temperature == 0
    chosen = Sampling() if greedy else Sampling(1.0 if temperature is None else temperature, **sampling)
    stops = [until] if isinstance(until, str) else until
    return [stop for stop in stops if stop], int(lengths[0]) if lengths else 256, chosen


def cut_before(text: str, stops: list[str]) -> str:
    return min((text.split(stop)[0] for stop in stops), key=len, default=text)


def load_harness_model(
    trained_dir: str | None, checkpoint_dir: str | None, prompt_style: str | None, batch_size: int, precision: str
) -> HarnessModel:
    """A trained folder over its base, or the base alone, for the harness."""
    device = default_device()
    if trained_dir and is_classifier(read_method(trained_dir)):
        raise UserError(f"{trained_dir} answers with labels, the harness asks for texts; use scripts/evaluate.py")
    dtype = base_dtype(precision, device)
    loaded = load_answerer(trained_dir, checkpoint_dir, prompt_style, dtype, device, quantize="none")
    return HarnessModel(loaded.model, loaded.tokenizer, loaded.style, batch_size)
