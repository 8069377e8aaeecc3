"""A tokenizer as the fields of a GGUF file, and back.

The fields ``tokenizer.ggml.*`` (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) hold the tokens, their types
and either merges ("gpt2", byte-level BPE: Llama 3, SmolLM2) or scores ("llama", sentencepiece BPE: LLaMA 1 and 2). The
pre-tokenizer, which splits the text before the merges, is only named; llama.cpp defines it. Names of fields omit
"tokenizer." here.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from gguf import TokenType
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as TokenizersTokenizer

from lit_llama.common.errors import UserError
from lit_llama.common.files import atomic_write, read_json, write_json
from lit_llama.tokenizer import (
    JSON_FILE,
    SENTENCEPIECE_FILE,
    SETTINGS_FILE,
    SentencePieceBackend,
    Tokenizer,
    read_settings,
    token_text,
)

# Llama 3's: contractions, words with one leading character, up to three digits, punctuation, line ends, spaces.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]  # its regex is GPT-2's
LLAMA3 = [
    pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
]
SMOLLM = [pre_tokenizers.Digits(individual_digits=True), *GPT2]  # every digit alone, then GPT-2's regex
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS: dict = {"gpt-2": GPT2, "default": GPT2, "smollm": SMOLLM, **dict.fromkeys(LLAMA3_NAMES, LLAMA3)}
LLAMA_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # llama.cpp's defaults for a sentencepiece vocabulary
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # in tokenizer_config.json, and in a GGUF

# ------------------------------------------------------------------------------------ fields -> tokenizer.json


def write_tokenizer(fields: dict, folder: Path, legacy: bool = True) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    With ``legacy``, sentencepiece also puts a space after a control token. Raises UserError if the kind of tokenizer or
    pre-tokenizer is unknown, or if fields are missing or inconsistent.
    """
    model, pre = fields.get("ggml.model"), fields.get("ggml.pre")
    if model != "llama" and (model != "gpt2" or pre not in PRE_TOKENIZERS):
        raise UserError(
            f"the GGUF's tokenizer is of kind {model!r} with pre-tokenizer {pre!r}; known are llama, and gpt2 with "
            f"{', '.join(PRE_TOKENIZERS)}. Convert the model's safetensors and tokenizer.json instead"
        )
    try:
        vocab = {token: i for i, token in enumerate(fields["ggml.tokens"])}
        types = fields.get("ggml.token_type", [TokenType.NORMAL] * len(vocab))
        settings = special_tokens(fields)
        if model == "gpt2":
            tokenizer = byte_level(vocab, fields)
        else:
            tokenizer = sentencepiece(vocab, types, settings["unk_token"], fields, legacy)
        for token, kind in zip(vocab, types, strict=True):
            if kind in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED):
                special = kind != TokenType.USER_DEFINED  # user-defined tokens are found in text
                tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])
        if settings["add_bos_token"]:
            bos = settings["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing([bos, "$A"], None, [(bos, vocab[bos])])
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"the tokenizer's fields are inconsistent: {error!r}") from None
    with atomic_write(folder / JSON_FILE) as temporary:
        tokenizer.save(str(temporary))
    write_json(folder / SETTINGS_FILE, {"tokenizer_class": "PreTrainedTokenizerFast", **settings})


def special_tokens(fields: dict) -> dict:
    """The content of tokenizer_config.json, with llama.cpp's defaults for missing fields."""
    is_llama = fields["ggml.model"] == "llama"
    defaults = LLAMA_IDS if is_llama else {}
    ids = {role: fields.get(f"ggml.{key}_token_id", defaults.get(key)) for role, key in ROLES.items()}
    settings = {f"{role}_token": fields["ggml.tokens"][i] for role, i in ids.items() if i is not None}
    wants_bos = fields.get("ggml.add_bos_token", is_llama or fields.get("ggml.pre") in LLAMA3_NAMES)
    settings["add_bos_token"] = bool(wants_bos) and "bos_token" in settings
    if "chat_template" in fields:
        settings["chat_template"] = fields["chat_template"]
    return settings


def byte_level(vocab: dict[str, int], fields: dict) -> TokenizersTokenizer:
    """Byte-level BPE (GPT-2's) with the file's merges."""
    pre, merges = fields["ggml.pre"], [tuple(merge.split(" ", 1)) for merge in fields.get("ggml.merges", [])]
    # Llama 3 does not split a word that is a token.
    tokenizer = TokenizersTokenizer(models.BPE(vocab, merges, ignore_merges=pre in LLAMA3_NAMES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(
    vocab: dict[str, int], types: list[int], unknown: str, fields: dict, legacy: bool
) -> TokenizersTokenizer:
    """Sentencepiece's BPE: no pre-tokenizer, spaces as U+2581, one of them in front, unknown characters as bytes."""
    merges = merges_by_score(vocab, types, fields["ggml.scores"])
    tokenizer = TokenizersTokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(fields.get("ggml.add_space_prefix", True))
    if legacy or not prefix:
        spaces = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer


def merges_by_score(tokens: Iterable[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that join to a third, best score first: sentencepiece stores scores, and no merges.

    Control tokens and bytes are left out: the characters "</s>" must not become the control token.
    """
    score = {token: s for token, s, kind in zip(tokens, scores, types, strict=True) if kind == TokenType.NORMAL}
    merges = [
        (token[:cut], token[cut:])
        for token in score
        for cut in range(1, len(token))
        if token[:cut] in score and token[cut:] in score
    ]
    return sorted(merges, key=lambda pair: (score[pair[0] + pair[1]], len(pair[0])), reverse=True)


# ------------------------------------------------------------------------------------ files -> fields


def sentencepiece_fields(path: Path) -> dict:
    """The fields of a tokenizer.model and the tokens that its folder adds."""
    backend = SentencePieceBackend(path.parent, read_settings(path.parent))
    processor, ids = backend.processor, range(backend.vocab_size)
    added = ids[processor.vocab_size() :]
    special = {"bos": backend.bos_id, "eos": backend.eos_id, "unknown": processor.unk_id()}
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [f"[PAD{i}]" if i in added and i not in backend.standalone else backend.token(i) for i in ids],
        "ggml.scores": [0.0 if i in added else processor.get_score(i) for i in ids],
        "ggml.token_type": [int(TokenType.CONTROL) if i in added else piece_type(processor, i) for i in ids],
        "ggml.add_space_prefix": processor.encode("a", out_type=str)[0].startswith("▁"),
        "ggml.add_bos_token": backend.bos_id is not None,
        **{f"ggml.{key}_token_id": i for key, i in special.items() if i is not None},
    }


def piece_type(processor: SentencePieceProcessor, i: int) -> int:
    for name in ("unknown", "control", "byte", "unused"):
        if getattr(processor, f"is_{name}")(i):
            return int(TokenType[name.upper()])
    return int(TokenType.NORMAL)


def vocabulary_fields(folder: Path, tokenizer: Tokenizer, rows: int, template: str | None) -> dict:
    """The fields of a checkpoint folder's tokenizer, with a token for each of the embedding's ``rows``.

    Raises UserError if llama.cpp has no such tokenizer.
    """
    path = folder / JSON_FILE
    fields = json_fields(path, tokenizer) if path.exists() else sentencepiece_fields(folder / SENTENCEPIECE_FILE)
    missing = rows - len(fields["ggml.tokens"])  # a model may have more rows than tokens
    fields["ggml.tokens"] += [f"[PAD{rows - missing + i}]" for i in range(missing)]
    fields["ggml.token_type"] += [int(TokenType.UNUSED)] * missing
    if "ggml.scores" in fields:
        fields["ggml.scores"] += [-1e9] * missing
    fields |= {"ggml.eos_token_id": tokenizer.eos_id, "ggml.add_bos_token": tokenizer.bos_id is not None}
    named = {role: named_id(tokenizer, role) for role in ("bos", "unk", "pad")}
    fields |= {f"ggml.{ROLES[role]}_token_id": token_id for role, token_id in named.items() if token_id is not None}
    if template := template or tokenizer.chat_template:
        fields["chat_template"] = template
    return fields


def named_id(tokenizer: Tokenizer, role: str) -> int | None:
    """The id of the "bos", "unk" or "pad" token, or None. A bos that no text begins with has one, too."""
    if role == "bos" and tokenizer.bos_id is not None:
        return tokenizer.bos_id
    return tokenizer.controls.get(token_text(tokenizer.settings, role))


def json_fields(path: Path, tokenizer: Tokenizer) -> dict:
    """The fields of a tokenizer.json: byte-level BPE, or sentencepiece's BPE."""
    content = read_json(path)
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    if model.get("type") != "BPE":
        raise UserError(f"{path} is of kind {model.get('type')!r}; a GGUF of a LLaMA needs BPE")
    names = {i: name for name, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    is_sentencepiece = bool(model.get("byte_fallback"))  # its byte tokens have names such as <0x0A>

    def kind(i: int) -> TokenType:
        if i not in names:
            return TokenType.UNUSED
        if names[i] == model.get("unk_token"):
            return TokenType.UNKNOWN
        if i in added:
            return TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
        return TokenType.BYTE if is_sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", names[i]) else TokenType.NORMAL

    ids = range(tokenizer.vocab_size)
    tokens = [names.get(i, f"[PAD{i}]") for i in ids]
    fields = {"ggml.tokens": tokens, "ggml.token_type": [int(kind(i)) for i in ids]}
    if not is_sentencepiece:
        return {"ggml.model": "gpt2", "ggml.pre": pre_tokenizer(content, path), **fields, "ggml.merges": merges}
    # Minus the rank of the first merge that makes a token, so that scores order tokens as merges do.
    rank = {merge.replace(" ", "", 1): i for i, merge in reversed(list(enumerate(merges)))}
    fields["ggml.scores"] = [-float(rank.get(token, len(merges))) for token in tokens]
    fields["ggml.add_space_prefix"] = tokens[tokenizer.encode("a")[0]].startswith("▁")
    return {"ggml.model": "llama", "ggml.pre": "default", **fields}


def pre_tokenizer(content: dict, path: Path) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json. Raises UserError if it has none."""

    def rule(content: dict) -> tuple:
        steps = content["pre_tokenizer"] or {}
        steps = [{**step, "trim_offsets": None} for step in steps.get("pretokenizers", [steps])]
        return steps, content["normalizer"], bool(content["model"].get("ignore_merges"))

    for name in PRE_TOKENIZERS:
        if rule(content) == rule(json.loads(byte_level({}, {"ggml.pre": name}).to_str())):
            return name
    raise UserError(
        f"{path} has a pre-tokenizer that is none of {', '.join(PRE_TOKENIZERS)}; "
        "export with scripts/export.py --to hf and try llama.cpp's own converter"
    )
