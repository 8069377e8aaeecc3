"""The tokenizer of a checkpoint folder: tokenizer.json or tokenizer.model behind one small class.

A control token spelled out in a text, such as "</s>" or "<|im_end|>", is encoded as its characters. Control tokens
enter a sequence only by their ids (``bos_id``, ``eos_id``, ``controls``), so data cannot forge a turn.
"""

import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, pre_tokenizers

from lit_llama.checkpoint import CONFIG_FILE
from lit_llama.common.errors import UserError
from lit_llama.common.files import atomic_write, read_json

JSON_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
TEMPLATE_FILE, GENERATION_FILE = "chat_template.jinja", "generation_config.json"
ADDED_FILE, MAP_FILE = "added_tokens.json", "special_tokens_map.json"
TOKENIZER_FILES = [JSON_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE, MAP_FILE, ADDED_FILE, GENERATION_FILE, TEMPLATE_FILE]
MAX_PADDING = 1024  # a model may have more rows than tokens, up to a round number
MARK = "\ue000"


class Tokenizer:
    """A checkpoint folder's tokenizer.json (tokenizers) or, without one, tokenizer.model (sentencepiece).

    ``decode(encode(text)) == text`` for every Unicode string, with two exceptions. Sentencepiece writes a space as
    U+2581, so it reads U+2581 as a space. A byte-level vocabulary may lack bytes (SmolLM2's lacks those of U+0004,
    U+0006, U+0013, U+0014, U+0016, U+001D and the unassigned planes 4 to 11); ``encode`` drops them with a warning.

    ``bos_id`` is the id in front of every sequence, or None; ``eos_ids`` are all that end a text, with ``eos_id``;
    ``strips`` are the tokens that absorb the whitespace on their left ("lstrip") or right; ``spaced_start`` says that
    a text has a space put before it at the very beginning, but not after a control token. Raises UserError if the
    tokenizer is missing, damaged or not the model's.
    """

    def __init__(self, checkpoint_dir: Path | str):
        folder = Path(checkpoint_dir)
        self.settings = read_settings(folder)
        self.chat_template = read_chat_template(folder)
        if (folder / JSON_FILE).exists():
            backend: JSONBackend | SentencePieceBackend = JSONBackend(folder, self.settings, self.chat_template or "")
        elif (folder / SENTENCEPIECE_FILE).exists():
            backend = SentencePieceBackend(folder, self.settings)
        else:
            raise UserError(f"{folder} holds neither {JSON_FILE} nor {SENTENCEPIECE_FILE}; copy the model's own there")
        if backend.eos_id is None:
            raise UserError(f"{folder} does not say which token ends a text; name it in {SETTINGS_FILE} as eos_token")
        self.backend, self.vocab_size = backend, backend.vocab_size
        self.bos_id, self.eos_id = backend.bos_id, backend.eos_id
        self.eos_ids = {self.eos_id, *generation_eos(folder)}
        self.controls, self.strips = backend.controls, backend.strips
        self.spaced_start = self.encode("a") != self.encode_batch(["a"], after="control")[0]
        spelled = sorted(filter(None, self.controls), key=len, reverse=True)  # the longest match wins
        self.control_pattern = re.compile(f"({'|'.join(map(re.escape, spelled))})")
        rows = read_json(folder / CONFIG_FILE).get("vocab_size") if (folder / CONFIG_FILE).exists() else None
        if isinstance(rows, int) and not 0 <= rows - self.vocab_size < MAX_PADDING:
            raise UserError(
                f"{folder}: the tokenizer has {self.vocab_size} tokens, but the model {rows} embeddings "
                f"({CONFIG_FILE}); copy the model's own tokenizer there, or add missing embeddings with "
                "resize_token_embeddings in transformers and convert again"
            )

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, without bos or eos. Raises UserError for a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], after: str = "nothing") -> list[list[int]]:
        """``encode`` of many texts, on all cores.

        ``after`` is what precedes them, as a dummy space depends on it: "nothing", a "control" token or more "text".
        """
        for text in texts:
            self.check(text)
        if after not in self.backend.without_space:
            return self.backend.encode_batch(texts)
        # The dummy space comes before U+E000, whose bytes no token joins with others.
        mark, *marked = self.backend.encode_batch([MARK, *(MARK + text for text in texts)])
        return [ids[len(mark) :] for ids in marked]

    def check(self, text: str) -> None:
        """Raises UserError for a lone surrogate. Warns of bytes that the vocabulary lacks."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at character {error.start}"
            raise UserError(f"the text holds a lone surrogate, {found}: half an emoji; repair or remove it") from None
        if unknown := data.translate(None, delete=self.backend.known_bytes):
            names = " ".join(f"{byte:02x}" for byte in sorted(set(unknown)))
            warnings.warn(f"the vocabulary has no token for {len(unknown)} bytes ({names}): dropped", stacklevel=4)

    def special_text(self, role: str) -> str:
        """The text of the "bos" or "eos" token, "" without one."""
        token_id = {"bos": self.bos_id, "eos": self.eos_id}[role]
        return token_text(self.settings, role) or ("" if token_id is None else self.token(token_id))

    def token(self, token_id: int) -> str:
        """The name of one token in the vocabulary."""
        return self.backend.token(token_id)

    def decode(self, ids: Iterable[int]) -> str:
        """The inverse of encode. Control tokens become their names; padding rows become nothing.

        Each text between control tokens was encoded alone, so it is decoded alone: each has its own dummy space.
        """
        names = self.backend.standalone
        stretches = groupby(ids, key=lambda i: i in names or i >= self.vocab_size)
        return "".join(
            "".join(names.get(i, "") for i in run) if alone else self.backend.decode(list(run))
            for alone, run in stretches
        )


class JSONBackend:
    """tokenizer.json through the tokenizers library."""

    def __init__(self, folder: Path, settings: dict, chat_template: str):
        try:
            content = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
            named = {token_text(settings, role) for role in ("bos", "eos")}
            for token in content.get("added_tokens", []):  # what a template writes is a control token, special or not
                token["special"] |= token["content"] in named or token["content"] in chat_template
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{folder / JSON_FILE} is damaged ({error}); copy it from the weights again") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # a control token in a text is encoded as its characters
        # Rules that put a space before every text; the scheme "first" puts none after a control token.
        always = ('"Prepend"', '"prepend_scheme": "always"', '"add_prefix_space": true')
        rules = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
        self.without_space = ["text"] if any(rule in rules for rule in always) else []
        if '"prepend_scheme": "first"' in rules:
            self.without_space = ["text", "control"]
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        added = self.tokenizer.get_added_tokens_decoder()
        self.strips = {side: {t.content for t in added.values() if getattr(t, side)} for side in ("lstrip", "rstrip")}
        # A normalizer that prepends a space does so after each added token too; the Metaspace pre-tokenizer does not.
        self.standalone = {i: t.content for i, t in added.items() if t.special or self.tokenizer.normalizer is not None}
        self.vocab_size = max(vocab.values()) + 1
        is_byte_level = isinstance(self.tokenizer.decoder, decoders.ByteLevel)
        self.known_bytes = byte_level_bytes(vocab) if is_byte_level else bytes(range(256))
        bos, eos = (vocab.get(token_text(settings, role)) for role in ("bos", "eos"))
        if eos is None:
            eos = next(iter(generation_eos(folder)), None)
        in_front = self.tokenizer.encode("", add_special_tokens=True).ids[:1]  # what the post-processor adds
        if bos is None and in_front != [eos]:
            bos = next(iter(in_front), None)
        self.controls = {token.content: i for i, token in added.items() if token.special}
        self.controls |= {self.token(i): i for i in (bos, eos) if i is not None}  # special or not
        wanted = settings.get("add_bos_token")
        self.bos_id = bos if (in_front == [bos] if wanted is None else wanted) else None
        self.eos_id = eos

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def token(self, token_id: int) -> str:
        return self.tokenizer.id_to_token(token_id) or ""

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class SentencePieceBackend:
    """tokenizer.model through sentencepiece: LLaMA 1 and 2."""

    known_bytes = bytes(range(256))  # each has a token, <0x00> to <0xFF>

    def __init__(self, folder: Path, settings: dict):
        path = folder / SENTENCEPIECE_FILE
        try:
            self.processor = processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path} is not a sentencepiece model; Llama 3 needs Hugging Face's {JSON_FILE}") from None
        self.without_space = ["text"] if settings.get("legacy", True) else ["text", "control"]
        pieces = range(processor.vocab_size())
        controls = [i for i in pieces if processor.is_control(i) or processor.is_unknown(i)]
        added = read_json(folder / ADDED_FILE) if (folder / ADDED_FILE).exists() else {}
        decoder = settings.get("added_tokens_decoder") or {}  # as the file: what Hugging Face adds to the model
        self.standalone = {i: processor.id_to_piece(i) for i in controls} | {i: token for token, i in added.items()}
        self.standalone |= {int(i): token["content"] for i, token in decoder.items()}
        self.strips = {side: {t["content"] for t in decoder.values() if t.get(side)} for side in ("lstrip", "rstrip")}
        self.vocab_size = max([len(pieces) - 1, *self.standalone]) + 1
        self.controls = {piece: i for i, piece in self.standalone.items()}
        self.bos_id, eos_id = (i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id()))
        self.eos_id = self.controls.get(token_text(settings, "eos"), eos_id)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode(texts)

    def token(self, token_id: int) -> str:
        return self.standalone.get(token_id) or self.processor.id_to_piece(token_id)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


def token_text(settings: dict, role: str) -> str:
    """The text of the "bos", "eos", "unk" or "pad" token, which is a string or an object with one; "" without it."""
    entry = settings.get(f"{role}_token")
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else ""


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json; what it lacks is in special_tokens_map.json."""
    paths = [path for path in (folder / MAP_FILE, folder / SETTINGS_FILE) if path.exists()]
    return {key: value for path in paths for key, value in read_json(path).items()}


def read_chat_template(folder: Path) -> str | None:
    """chat_template.jinja or, without it, the template in tokenizer_config.json: of several, the one named default."""
    path = folder / TEMPLATE_FILE
    template = path.read_text(encoding="utf-8") if path.exists() else read_settings(folder).get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) and template else None


def generation_eos(folder: Path) -> list[int]:
    """The end-of-sequence ids of generation_config.json."""
    path = folder / GENERATION_FILE
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def byte_level_bytes(vocab: dict[str, int]) -> bytes:
    """The bytes that have a token: GPT-2 writes printable Latin-1 as itself, and other bytes as U+0100, U+0101, ..."""
    printable = {ord(char) for char in pre_tokenizers.ByteLevel.alphabet() if ord(char) < 256}
    others = [byte for byte in range(256) if byte not in printable]
    return bytes(b for b in range(256) if chr(b if b in printable else 256 + others.index(b)) in vocab)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files to ``folder`` from ``source``, a folder or a file in it, or print that it has none."""
    if not source.exists():
        raise UserError(f"{source} is missing: --tokenizer takes tokenizer.json, tokenizer.model or their folder")
    source = source if source.is_dir() else source.parent
    found = [name for name in TOKENIZER_FILES if (source / name).exists()]
    if not {JSON_FILE, SENTENCEPIECE_FILE} & set(found):
        print(f"note: {source} has no tokenizer.json or tokenizer.model; encoding text needs one", file=sys.stderr)
    for name in found:
        with atomic_write(folder / name) as temporary:
            shutil.copyfile(source / name, temporary)
