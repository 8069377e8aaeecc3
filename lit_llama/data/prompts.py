"""Prompt styles: how messages become the text that a model was trained on.

A style turns messages into pieces, each encoded on its own, so the border between prompt and answer is always a border
between tokens. Only a style makes control tokens; what users write is text even if it spells one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lit_llama.common.errors import UserError
from lit_llama.common.files import write_json
from lit_llama.data.chat_templates import ALPACA_INTRO, style_of, template_of
from lit_llama.tokenizer import SETTINGS_FILE, TEMPLATE_FILE, Tokenizer, read_settings


class Control(str):
    """A control token, such as <|im_end|>: a single id."""


BOS, EOS = Control("bos"), Control("eos")  # whichever the tokenizer has

Message = dict  # {"role": "system" | "user" | "assistant", "content": str}, "input" too in an Alpaca record
Piece = tuple[str, bool]  # text or Control, and whether it is trained on


def user_text(message: Message) -> str:
    """The instruction, followed by its input if it has one."""
    return "\n\n".join(filter(None, [message["content"], message.get("input")]))


def chatml(messages: list[Message]) -> Iterator[Piece]:
    """<|im_start|>user\\n...<|im_end|>\\n: SmolLM2 and others (https://huggingface.co/HuggingFaceTB)."""
    for message in messages:
        answer = message["role"] == "assistant"
        yield Control("<|im_start|>"), False
        if answer:
            yield "assistant\n", False
            yield message["content"], True
        else:
            yield f"{message['role']}\n{user_text(message)}", False
        yield Control("<|im_end|>"), answer
        yield "\n", False
    if messages[-1]["role"] != "assistant":
        yield Control("<|im_start|>"), False
        yield "assistant\n", False


def llama3(messages: list[Message]) -> Iterator[Piece]:
    """<|start_header_id|>user<|end_header_id|>\\n\\n...<|eot_id|>: Llama 3's instruct models."""
    yield BOS, False
    unanswered = [] if messages[-1]["role"] == "assistant" else [{"role": "assistant", "content": None}]
    for message in [*messages, *unanswered]:
        answer = message["role"] == "assistant"
        yield Control("<|start_header_id|>"), False
        yield message["role"], False
        yield Control("<|end_header_id|>"), False
        if answer:
            yield "\n\n", False
        if message["content"] is not None:
            yield message["content"] if answer else f"\n\n{user_text(message)}", answer
            yield Control("<|eot_id|>"), answer


def llama2(messages: list[Message]) -> Iterator[Piece]:
    """[INST] ... [/INST] answer </s>: Llama 2's chat models. A system message becomes part of the next user's turn."""
    system = ""
    for message in messages:
        if system and message["role"] != "user":
            break
        if message["role"] == "system":
            system = f"<<SYS>>\n{message['content']}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            yield BOS, False
            yield f"[INST] {system}{user_text(message)} [/INST]", False
            system = ""
        else:
            yield message["content"], True
            yield EOS, True
    if system:
        raise UserError("llama2 needs a user's turn after every system message")


ALPACA_PAIRED = ", paired with an input that provides further context"


def alpaca(messages: list[Message]) -> Iterator[Piece]:
    """### Instruction: ... ### Response: as in Stanford Alpaca, for bases without a chat format of their own."""

    def text(message: Message) -> str:
        if message["role"] == "system":
            return f"{message['content']}\n\n"
        given = f"### Input:\n{message['input']}\n\n" if message.get("input") else ""
        intro = ALPACA_INTRO.format(paired=ALPACA_PAIRED if given else "")
        return f"{intro}\n\n### Instruction:\n{message['content']}\n\n{given}### Response:\n"

    return plain(messages, text)


def plain(messages: list[Message], text: Callable[[Message], str] = user_text) -> Iterator[Piece]:
    """The texts as they are: the model continues a prompt, with nothing between prompt and answer."""
    yield BOS, False
    for message in messages:
        if message["role"] == "assistant":
            yield message["content"], True
            yield EOS, True
        else:
            yield text(message), False


STYLES: dict[str, Callable[[list[Message]], Iterator[Piece]]] = {
    style.__name__: style for style in (alpaca, chatml, llama2, llama3, plain)
}
END_OF_TURN = {"chatml": Control("<|im_end|>"), "llama3": Control("<|eot_id|>")}  # EOS in the other styles


def choose_style(name: str | None, tokenizer: Tokenizer) -> str:
    """Check the name of a style, or choose the tokenizer's own if it is None.

    Raises UserError if there is no such style, or the tokenizer lacks its control tokens.
    """
    name = name or default_style(tokenizer)
    if name not in STYLES:
        raise UserError(f"prompt_style {name!r} is none of {', '.join(STYLES)}")
    encode_control(END_OF_TURN.get(name, EOS), tokenizer)
    return name


def default_style(tokenizer: Tokenizer) -> str:
    """The style of the tokenizer's template if we wrote it, else what its control tokens suggest, else alpaca."""
    if style := style_of(tokenizer.chat_template):
        return style
    if tokenizer.control_id("<|im_start|>") is not None:
        return "chatml"
    if tokenizer.control_id("<|start_header_id|>") is not None:
        return "llama3"
    return "llama2" if "[INST]" in (tokenizer.chat_template or "") else "alpaca"


def chat_template(tokenizer: Tokenizer, style: str | None) -> str | None:
    """The template of a style, or the tokenizer's own if the style is None (None if it has none)."""
    if style is None:
        return tokenizer.chat_template
    return template_of(choose_style(style, tokenizer), tokenizer.bos_id is not None)


def write_chat_template(folder: Path, tokenizer: Tokenizer, style: str | None) -> None:
    """Write ``chat_template`` into the tokenizer's settings in ``folder``, so that readers ask in this style."""
    template = chat_template(tokenizer, style)
    if template is not None:
        write_json(folder / SETTINGS_FILE, read_settings(folder) | {"chat_template": template})
        (folder / TEMPLATE_FILE).unlink(missing_ok=True)  # transformers would read it first


def encode_control(token: Control, tokenizer: Tokenizer) -> list[int]:
    """The id of a control token; no id for BOS if the tokenizer uses none. Raises UserError if the token is missing."""
    if token is BOS:
        return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    token_id = tokenizer.eos_id if token is EOS else tokenizer.control_id(token)
    if token_id is None:
        raise UserError(f"the tokenizer has no control token {token}; choose another prompt_style of {list(STYLES)}")
    return [token_id]


def encode_pieces(rows: Iterable[Iterable[Piece]], tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """The token ids of each row, and for each id whether it is trained on. All texts are encoded at once."""
    rows = [list(row) for row in rows]
    texts = list(dict.fromkeys(piece for row in rows for piece, _ in row if not isinstance(piece, Control)))
    ids_of = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    encoded = []
    for row in rows:
        ids: list[int] = []
        trains: list[bool] = []
        for piece, train in row:
            new = encode_control(piece, tokenizer) if isinstance(piece, Control) else ids_of[piece]
            ids += new
            trains += [train] * len(new)
        encoded.append((ids, trains))
    return encoded


def encode_prompt(messages: list[Message], style: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids up to where the model's answer begins."""
    return encode_pieces([STYLES[style](messages)], tokenizer)[0][0]


def stop_ids(style: str, tokenizer: Tokenizer) -> set[int]:
    """The ids that end an answer."""
    return {tokenizer.eos_id, *encode_control(END_OF_TURN.get(style, EOS), tokenizer)}
