r"""Prompts: how messages become token ids, by the chat template of the base.

A chat template is a Jinja program that writes messages as one text. Rendered with a placeholder for each message's
content, it shows which parts of the text are its own. Control tokens are read only there, so what users write never
becomes one. What follows an answer, up to the first control token, ends the answer and is trained with it. An example:

    messages   user: Hi                         assistant: Hello
    layout     "<|im_start|>user\n" Field "<|im_end|>\n<|im_start|>assistant\n" Field "<|im_end|>\n"
    pieces     <|im_start|>, user\nHi, <|im_end|>, \n, <|im_start|>, assistant\n, Hello, <|im_end|>, \n
    trains                                                                        -----  ----------
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeGuard

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_llama.common.errors import UserError
from lit_llama.common.files import write_json
from lit_llama.tokenizer import SETTINGS_FILE, TEMPLATE_FILE, Tokenizer, read_settings

Message = dict  # {"role": "system" | "user" | "assistant", "content": str}; in an Alpaca record also "input"

STYLES = ("alpaca", "plain", "template")
WAY_OUT = "pass --prompt_style alpaca or plain"

BOS_LINE = "{{- bos_token }}\n"
SPACED_BOS_LINE = "{{- bos_token + ' ' }}\n"

# As in Stanford Alpaca, for bases without a template. "{{-" and "{%-" remove the whitespace in front.
ALPACA = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- elif message['role'] == 'system' %}
        {{- message['content'] + '\n\n' }}
    {%- else %}
        {{- 'Below is an instruction that describes a task' }}
        {{- ', paired with an input that provides further context' if message['input'] }}
        {{- '. Write a response that appropriately completes the request.\n\n' }}
        {{- '### Instruction:\n' + message['content'] + '\n\n' }}
        {{- '### Input:\n' + message['input'] + '\n\n' if message['input'] }}
        {{- '### Response:\n' }}
    {%- endif %}
{%- endfor %}
""".strip()

# Nothing between prompt and answer: the model continues a text.
PLAIN = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- message['content'] + (eos_token if message['role'] == 'assistant' else '') }}
{%- endfor %}
""".strip()

# The style "chatml" of earlier versions.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def choose_template(style: str | None, tokenizer: Tokenizer) -> str:
    """The chat template of a style: by default the tokenizer's own, or else alpaca.

    Raises UserError if there is no such style or template, or if the template does not fit the tokenizer.
    """
    if style is None:
        style = "template" if tokenizer.chat_template else "alpaca"
    if style not in STYLES:
        raise UserError(f"--prompt_style {style!r} is none of {', '.join(STYLES)}")
    if style == "template" and not tokenizer.chat_template:
        raise UserError(f"the base has no chat template; {WAY_OUT}")
    template = {"alpaca": ALPACA, "plain": PLAIN, "template": tokenizer.chat_template or ""}[style]
    if style != "template" and tokenizer.bos_id is None:
        template = template.removeprefix(BOS_LINE)
    return fitted(template, tokenizer)


def fitted(template: str, tokenizer: Tokenizer) -> str:
    """The template, checked. The plain one writes the space that the tokenizer put before a text in pretraining."""
    if template == PLAIN and tokenizer.spaced_start:
        template = template.replace(BOS_LINE, SPACED_BOS_LINE)
    end_of_answer(template, tokenizer)
    return template


def style_of(template: str) -> str:
    """The style that a template belongs to, for messages."""
    with_bos = BOS_LINE + template.removeprefix(BOS_LINE).removeprefix(SPACED_BOS_LINE)
    return {ALPACA: "alpaca", PLAIN: "plain"}.get(with_bos, "template")


def describe_template(template: str) -> dict:
    """The part of method.json that ``trained_template`` reads, and the date, if the template writes it."""
    dated = {"prompt_date": STARTED.date().isoformat()} if "strftime_now" in template else {}
    return {"prompt_style": style_of(template), "chat_template": template, **dated}


def trained_template(method: dict, tokenizer: Tokenizer, prompt_style: str | None = None) -> str:
    """The template for prompting a trained model: that of ``prompt_style``, else the one it was trained with.

    For a base, ``method`` is {}.
    """
    if prompt_style:
        return choose_template(prompt_style, tokenizer)
    style = method.get("prompt_style")
    if template := method.get("chat_template") or {"chatml": CHATML}.get(style or ""):
        return fitted(template, tokenizer)
    if style in ("llama2", "llama3"):
        raise UserError(f"the prompt style {style} of earlier versions is gone; train again with the base's template")
    return choose_template(style, tokenizer)


def write_chat_template(folder: Path, template: str) -> None:
    """Write a template into the tokenizer's settings in ``folder``, so that readers ask as in training."""
    write_json(folder / SETTINGS_FILE, read_settings(folder) | {"chat_template": template})
    (folder / TEMPLATE_FILE).unlink(missing_ok=True)  # transformers would read it first


# ---------------------------------------------------------------------------------------------- rendering


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks answers for transformers; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as transformers writes it: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


STARTED = datetime.now()  # one date for all prompts of a process
ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0
)
ENVIRONMENT.filters["tojson"] = tojson
ENVIRONMENT.globals |= {"raise_exception": raise_exception, "strftime_now": STARTED.strftime}
compiled = lru_cache(maxsize=16)(ENVIRONMENT.from_string)


def render(template: str, messages: list[Message], tokenizer: Tokenizer) -> str:
    """The text that a template makes of the messages, with the opening of an answer unless the last is one."""
    try:
        return compiled(template).render(
            messages=messages,
            add_generation_prompt=messages[-1]["role"] != "assistant",
            bos_token=tokenizer.special_text("bos"),
            eos_token=tokenizer.special_text("eos"),
        )
    except TemplateError as error:
        raise UserError(f"the chat template refuses this: {error}") from None
    except (TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"the chat template fails ({error}); {WAY_OUT}") from None


# ---------------------------------------------------------------------------------------------- layout

# A field's place in a rendered text. The blanks show whether the template strips the field.
PLACE = "\u2003\ue000{}\ue001\u2003"
FOUND = re.compile("(\u2003?)\ue000(\\d+)([ci])\ue001(\u2003?)")


class Field(NamedTuple):
    """Where a template puts a message's content ("c") or input ("i"), and which sides of it are stripped."""

    message: int
    key: str
    strips: tuple[bool, bool]

    def text(self, messages: list[Message]) -> str:
        text = messages[self.message]["content" if self.key == "c" else "input"]
        text = text.lstrip() if self.strips[0] else text
        return text.rstrip() if self.strips[1] else text


Shape = tuple[tuple[str, bool], ...]  # of messages: each one's role, and whether it has an input of its own
Layout = tuple["str | Field", ...]  # the template's own texts, with a field between two of them


@lru_cache(maxsize=1024)
def layout(template: str, shape: Shape, tokenizer: Tokenizer) -> Layout:
    """What a template makes of messages with this shape: its texts and the fields between them.

    Raises UserError if the template does not write every field once, unchanged or stripped.
    """
    marked = [
        {"role": role, "content": PLACE.format(f"{i}c")} | ({"input": PLACE.format(f"{i}i")} if has_input else {})
        for i, (role, has_input) in enumerate(shape)
    ]
    parts: list[str | Field] = []
    text, end = render(template, marked, tokenizer), 0
    for match in FOUND.finditer(text):
        parts.append(text[end : match.start()])
        parts.append(Field(int(match[2]), match[3], (not match[1], not match[4])))
        end = match.end()
    places = sorted(part[:2] for part in parts if isinstance(part, Field))
    wanted = [(i, key) for i, (_, has_input) in enumerate(shape) for key in ("ci" if has_input else "c")]
    if places != wanted:
        i, key = next(place for place in wanted if places.count(place) != 1)
        raise UserError(
            f"the chat template does not write the {shape[i][0]} message {i + 1} of {len(shape)} once, as it is; "
            f"leave it out, or {WAY_OUT}"
        )
    return (*parts, text[end:])


def user_text(message: Message) -> str:
    """The instruction, followed by its input if it has one."""
    return "\n\n".join(filter(None, [message["content"], message.get("input")]))


def for_template(messages: list[Message], template: str) -> list[Message]:
    """Role and content of each message. Its input becomes part of the content, unless the template reads it."""
    if "message['input']" in template:
        return [{key: message.get(key, "") for key in ("role", "content", "input")} for message in messages]
    return [{"role": message["role"], "content": user_text(message)} for message in messages]


def shape_of(messages: list[Message]) -> Shape:
    return tuple((message["role"], bool(message.get("input"))) for message in messages)


@lru_cache(maxsize=1024)
def answer_opening(template: str, shape: Shape, tokenizer: Tokenizer) -> tuple[str, str]:
    """How a prompt of this shape ends, and the whitespace between it and the answer: a space with Llama 2, else "".

    Raises UserError if a prompt ends differently from the text before an answer.
    """
    answered = layout(template, (*shape, ("assistant", False)), tokenizer)
    place = next(i for i, part in enumerate(answered) if isinstance(part, Field) and part.message == len(shape))
    before, prompt = str(answered[place - 1]), str(layout(template, shape, tokenizer)[-1]) if shape else ""
    if not before.startswith(prompt):
        raise UserError(
            f"the chat template ends a prompt with {prompt[-40:]!r}, but has {before[-40:]!r} before an answer; "
            f"{WAY_OUT}"
        )
    rest = before.removeprefix(prompt)
    return (prompt, rest) if rest.isspace() else (before, "")  # some templates ignore add_generation_prompt


def check_rendering(parts: Layout, messages: list[Message], template: str, tokenizer: Tokenizer) -> None:
    """Raises UserError if the template changes a text, though it did not change a placeholder."""
    expected = "".join(part.text(messages) if isinstance(part, Field) else part for part in parts)
    if render(template, messages, tokenizer) != expected:
        raise UserError(
            "the chat template changes the text of a message, here one of "
            f"{', '.join(repr(message['content'][:30]) for message in messages)}; {WAY_OUT}"
        )


# ---------------------------------------------------------------------------------------------- pieces


class Control(str):
    """A control token, such as <|im_end|>: a single id."""


class Piece(NamedTuple):
    """A part of a prompt that is encoded by itself: a Control, a text, or an answer whose ids are known."""

    text: str
    trains: bool
    ids: list[int] | None = None


def pieces(messages: list[Message], template: str, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The parts of a conversation; without an answer at its end, up to where the answer begins.

    No piece holds both prompt and answer. A message with "weight" 0 is not trained on; "ids" are those of its content.
    Raises UserError if the template refuses the messages or changes a text.
    """
    given = for_template(messages, template)
    shape = shape_of(given)
    parts = layout(template, shape, tokenizer)
    check_rendering(parts, given, template, tokenizer)
    if shape[-1][0] != "assistant":
        parts = (*parts[:-1], answer_opening(template, shape, tokenizer)[0])
    text, trains, ids = "", False, None  # the piece so far
    for before, part, following in zip(("", *parts[:-1]), parts, (*parts[1:], ""), strict=True):
        if isinstance(part, Field):
            text += part.text(given)
            continue
        answer = following.message if is_answer(following, shape) else None  # it begins at the end of this part
        separator = "" if answer is None else answer_opening(template, shape[:answer], tokenizer)[1]
        first, *others = tokenizer.control_pattern.split(part.removesuffix(separator))
        if is_answer(before, shape) and not others:
            raise UserError(f"the chat template does not end an answer with a control token; {WAY_OUT}")
        text += first
        for control, text_after in zip(others[::2], others[1::2], strict=True):
            if text or ids:
                yield Piece(text, trains, ids)
            yield Piece(Control(control), trains)
            text, trains, ids = text_after, False, None
        if answer is not None:
            if text:
                yield Piece(text, trains)
            text, trains, ids = separator, messages[answer].get("weight") != 0, messages[answer].get("ids")
    if text:
        yield Piece(text, trains)


def is_answer(part: str | Field, shape: Shape) -> TypeGuard[Field]:
    return isinstance(part, Field) and shape[part.message][0] == "assistant"


def encode_pieces(rows: Iterable[Iterable[Piece]], tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """The token ids of each row, and for each id whether it is trained on. All texts are encoded at once.

    Some tokenizers put a space before a text, depending on what precedes it: nothing, a control token, or more text.
    """
    stripped = (without_stripped(list(row), tokenizer) for row in rows)
    places = [[*zip(row, preceding(row), strict=True)] for row in stripped]
    ids_of: dict[tuple[str, str], list[int]] = {}
    for after in ("nothing", "control", "text"):
        found = (piece.text for row in places for piece, place in row if place == after and not piece.ids)
        texts = list(dict.fromkeys(found))
        ids_of |= {(after, text): ids for text, ids in zip(texts, tokenizer.encode_batch(texts, after), strict=True)}
    encoded = []
    for row in places:
        ids: list[int] = []
        trains: list[bool] = []
        for piece, after in row:
            new = piece.ids or ([tokenizer.controls[piece.text]] if after == "" else ids_of[after, piece.text])
            ids += new
            trains += [piece.trains] * len(new)
        encoded.append((ids, trains))
    return encoded


def without_stripped(row: list[Piece], tokenizer: Tokenizer) -> list[Piece]:
    """The pieces without the whitespace that a control token next to them takes with it."""
    if not any(tokenizer.strips.values()):
        return row
    kept = []
    texts = [piece.text for piece in row]
    for before, piece, following in zip(["", *texts[:-1]], row, [*texts[1:], ""], strict=True):
        text: str = piece.text
        if not isinstance(text, Control) and not piece.ids:
            text = text.lstrip() if isinstance(before, Control) and before in tokenizer.strips["rstrip"] else text
            text = text.rstrip() if isinstance(following, Control) and following in tokenizer.strips["lstrip"] else text
        if text:
            kept.append(piece._replace(text=text))
    return kept


def preceding(row: list[Piece]) -> Iterator[str]:
    """For each piece, what its text follows: "nothing", "control" or "text"; "" for a control token."""
    after = "nothing"
    for piece in row:
        is_control = isinstance(piece.text, Control)
        yield "" if is_control else after
        after = "control" if is_control else "text"


def encode_prompt(messages: list[Message], template: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids up to where the model's answer begins; of the whole conversation if it ends with an answer."""
    return encode_pieces([pieces(messages, template, tokenizer)], tokenizer)[0][0]


@lru_cache(maxsize=64)
def control_pieces(template: str, tokenizer: Tokenizer) -> list[Piece]:
    """The control tokens around a question and its answer. Raises UserError if the template does not fit."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return [piece for piece in pieces(talk, template, tokenizer) if isinstance(piece.text, Control)]


def end_of_answer(template: str, tokenizer: Tokenizer) -> int:
    """The id of the control token that ends an answer. Raises UserError if there is none."""
    return next(tokenizer.controls[piece.text] for piece in control_pieces(template, tokenizer) if piece.trains)


def stop_ids(template: str, tokenizer: Tokenizer) -> set[int]:
    """The ids that end an answer."""
    return {*tokenizer.eos_ids, end_of_answer(template, tokenizer)}
