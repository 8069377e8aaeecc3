r"""Prompts: how messages become token ids, by the chat template of the base.

A chat template is a Jinja program that writes messages as one text. Rendered with a placeholder for each message's
content, it shows which parts of the text are its own. Control tokens are read only there, so what users write never
becomes one. What follows an answer, up to the first control token, ends the answer and is trained with it. An example:

    messages   user: Hi                         assistant: Hello
    marked     <|im_start|>user\n(0)<|im_end|>\n<|im_start|>assistant\n(1)<|im_end|>\n
    pieces     <|im_start|>, user\nHi, <|im_end|>, \n, <|im_start|>, assistant\n, Hello, <|im_end|>, \n
    trains                                                                        -----  ----------
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_llama.common.errors import UserError
from lit_llama.common.files import write_json
from lit_llama.tokenizer import SETTINGS_FILE, TEMPLATE_FILE, Tokenizer, read_settings

Message = dict  # {"role": "system" | "user" | "assistant", "content": str}; in an Alpaca record also "input"

STYLES = ("alpaca", "plain", "template")
WAY_OUT = "pass --prompt_style alpaca or plain"

# The first line of our own templates, if the tokenizer begins a text with a token. The second is for the plain style,
# if the tokenizer put a space before a text in pretraining.
BOS_LINE = "{{- bos_token }}\n"
SPACED_BOS_LINE = "{{- bos_token + ' ' }}\n"

# As in Stanford Alpaca, for bases without a template. "{{-" and "{%-" remove the whitespace in front.
ALPACA = r"""
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


def choose_template(style: str | None, tokenizer: Tokenizer, own: str | None = None) -> str:
    """The template of a style, by default ``own``, the tokenizer's or alpaca. Raises UserError if it does not fit."""
    own = own or tokenizer.chat_template
    style = style or ("template" if own else "alpaca")
    if style not in STYLES:
        raise UserError(f"the prompt style {style!r} is none of {', '.join(STYLES)}")
    bos = "" if tokenizer.bos_id is None else BOS_LINE
    template = {"alpaca": bos + ALPACA, "plain": bos + PLAIN, "template": own}[style]
    if template is None:
        raise UserError(f"the base has no chat template; {WAY_OUT}")
    if template == BOS_LINE + PLAIN and tokenizer.spaced_start:
        template = SPACED_BOS_LINE + PLAIN
    end_of_answer(template, tokenizer)  # refuses what does not fit
    return template


def style_of(template: str) -> str:
    """The style that a template belongs to, for messages."""
    without_bos = template.removeprefix(BOS_LINE).removeprefix(SPACED_BOS_LINE)
    return {ALPACA: "alpaca", PLAIN: "plain"}.get(without_bos, "template")


def describe_template(template: str) -> dict:
    """The part of method.json that ``trained_template`` reads, and the date, if the template writes it."""
    dated = {"prompt_date": STARTED.date().isoformat()} if "strftime_now" in template else {}
    return {"prompt_style": style_of(template), "chat_template": template, **dated}


def trained_template(method: dict, tokenizer: Tokenizer, prompt_style: str | None = None) -> str:
    """The template of ``prompt_style``, else the one that the model was trained with. A base's ``method`` is {}."""
    style = method.get("prompt_style")
    own = method.get("chat_template") or (CHATML if style == "chatml" else None)
    if prompt_style or not own:
        return choose_template(prompt_style or style, tokenizer)
    return choose_template("template", tokenizer, own)


def write_chat_template(folder: Path, template: str) -> None:
    """Write a template into the tokenizer's settings in ``folder``, so that readers ask as in training."""
    write_json(folder / SETTINGS_FILE, read_settings(folder) | {"chat_template": template})
    (folder / TEMPLATE_FILE).unlink(missing_ok=True)  # transformers would read it first


# ---------------------------------------------------------------------------------------------- rendering


def raise_exception(message: str) -> None:
    raise TemplateError(message)


STARTED = datetime.now()  # one date for all prompts of a process
ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
ENVIRONMENT.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
ENVIRONMENT.globals |= {"raise_exception": raise_exception, "strftime_now": STARTED.strftime}


@lru_cache(maxsize=16)
def compiled(template: str) -> Template:
    # {% generation %} ... {% endgeneration %} mark answers for transformers. As a "with" they change nothing.
    return ENVIRONMENT.from_string(re.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", template))


def render(template: str, messages: list[Message], tokenizer: Tokenizer) -> str:
    """The text that a template makes of the messages, with the opening of an answer unless the last is one."""
    try:
        return compiled(template).render(
            messages=messages,
            add_generation_prompt=messages[-1]["role"] != "assistant",
            bos_token=tokenizer.special_text("bos"),
            eos_token=tokenizer.special_text("eos"),
        )
    except Exception as error:  # a template is a program, and may fail in any way
        raise UserError(f"the chat template refuses this: {error}; {WAY_OUT}") from None


# The place of a message's content or input in a rendered text. The blanks show whether the template strips it.
PLACE = "\u2003\ue000{} {}\ue001\u2003"
PLACES = re.compile("(\u2003?)\ue000(\\d+) (content|input)\ue001(\u2003?)")

Shape = tuple[tuple[str, ...], ...]  # for each message: its role, "content", and "input" if it has one


def user_text(message: Message) -> str:
    """The instruction, followed by its input if it has one."""
    return "\n\n".join(filter(None, [message["content"], message.get("input")]))


def for_template(message: Message, template: str) -> Message:
    """The message as the template reads it: most know no input, so there it becomes part of the content."""
    if message.get("input") and "message['input']" in template:
        return {key: message[key] for key in ("role", "content", "input")}
    return {"role": message["role"], "content": user_text(message)}


@lru_cache(maxsize=1024)
def marked(template: str, shape: Shape, tokenizer: Tokenizer) -> str:
    """What a template makes of messages with this shape, with a PLACE for each text, which it must write just once."""
    messages = [{"role": role} | {key: PLACE.format(i, key) for key in keys} for i, (role, *keys) in enumerate(shape)]
    text = render(template, messages, tokenizer)
    written = [(int(place[2]), place[3]) for place in PLACES.finditer(text)]
    for i, (role, *keys) in enumerate(shape):
        if any(written.count((i, key)) != 1 for key in keys):
            raise UserError(f"the chat template does not write the {role} message once, as it is; {WAY_OUT}")
    return text


def fill(text: str, messages: list[Message]) -> str:
    """A marked text with what the messages say."""

    def content(place: re.Match) -> str:
        said = messages[int(place[2])][place[3]]
        said = said if place[1] else said.lstrip()
        return said if place[4] else said.rstrip()

    return PLACES.sub(content, text)


class Piece(NamedTuple):
    """A part of a prompt that is encoded by itself. The ``ids`` of a control token and an earlier answer are known."""

    text: str
    trains: bool
    after: str = "nothing"  # or "control" or "text": what precedes it decides whether the tokenizer adds a space
    ids: list[int] | None = None


def pieces(messages: list[Message], template: str, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The parts of a conversation; without an answer at its end, up to where the answer begins.

    No piece holds both prompt and answer. A message with "weight" 0 is not trained on; "ids" are those of its content.
    Raises UserError if the template refuses the messages or changes a text.
    """
    given = [for_template(message, template) for message in messages]
    shape = tuple((message["role"], *(key for key in message if key != "role")) for message in given)
    if render(template, given, tokenizer) != fill(marked(template, shape, tokenizer), given):
        raise UserError(f"the chat template changes the text of a message; {WAY_OUT}")
    if shape[-1][0] != "assistant":
        shape = (*shape, ("assistant", "content"))
    text = marked(template, shape, tokenizer)
    begin, answer, before, after = 0, None, None, "nothing"  # about the next piece
    for match in re.finditer(f"{PLACES.pattern}|{tokenizer.control_pattern.pattern}|\\Z", text):
        place, control, end = None if match[2] is None else int(match[2]), match[5], match.start()
        if answer is not None and control is None:
            raise UserError(f"the chat template does not end an answer with a control token; {WAY_OUT}")
        if place is not None:
            if shape[place][0] != "assistant":
                continue
            texts = text[:end], marked(template, shape[:place], tokenizer) if place else ""
            # what follows the last message in each
            opening, prompt = (it.rpartition("\ue001")[2].removeprefix("\u2003") for it in texts)
            if not opening.startswith(prompt):
                raise UserError(f"the chat template does not end a prompt as it begins an answer; {WAY_OUT}")
            rest = opening.removeprefix(prompt)  # a space with Llama 2; all without add_generation_prompt
            end -= len(rest) if rest.isspace() else 0
        part = fill(text[begin:end], given)
        part = part.lstrip() if before in tokenizer.strips["rstrip"] else part  # the token takes whitespace with it
        part = part.rstrip() if control in tokenizer.strips["lstrip"] else part
        message: Message = {"weight": 0} if answer is None else messages[answer]
        trains, ids = message.get("weight") != 0, message.get("ids")
        if part or ids:
            yield Piece(part, trains, after, ids)
            before, after = None, "text"
        if control is not None:
            yield Piece(control, trains, after, [tokenizer.controls[control]])
            before, after, end = control, "control", match.end()
        if place == len(messages):
            return
        begin, answer = end, place


def encode_pieces(rows: Iterable[Iterable[Piece]], tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """The token ids of each row, and for each id whether it is trained on. All texts are encoded at once."""
    listed = [list(row) for row in rows]
    ids_of: dict[tuple[str, str], list[int]] = {}
    for after in ("nothing", "control", "text"):
        texts = list({piece.text for row in listed for piece in row if piece.after == after and not piece.ids})
        ids_of |= {(after, text): ids for text, ids in zip(texts, tokenizer.encode_batch(texts, after), strict=True)}
    encoded = []
    for row in listed:
        ids = [piece.ids or ids_of[piece.after, piece.text] for piece in row]
        trains = ([piece.trains] * len(own) for piece, own in zip(row, ids, strict=True))
        encoded.append(([*chain.from_iterable(ids)], [*chain.from_iterable(trains)]))
    return encoded


def encode_prompt(messages: list[Message], template: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids up to where the model's answer begins; of the whole conversation if it ends with an answer."""
    return encode_pieces([pieces(messages, template, tokenizer)], tokenizer)[0][0]


@lru_cache(maxsize=64)
def control_pieces(template: str, tokenizer: Tokenizer) -> list[Piece]:
    """The control tokens around a question and its answer. Raises UserError if the template does not fit."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return [piece for piece in pieces(talk, template, tokenizer) if piece.ids]


def end_of_answer(template: str, tokenizer: Tokenizer) -> int:
    """The id of the control token that ends an answer. Raises UserError if there is none."""
    return next(tokenizer.controls[piece.text] for piece in control_pieces(template, tokenizer) if piece.trains)


def stop_ids(template: str, tokenizer: Tokenizer) -> set[int]:
    """The ids that end an answer."""
    return {*tokenizer.eos_ids, end_of_answer(template, tokenizer)}
