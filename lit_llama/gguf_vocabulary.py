"""tokenizer.model or tokenizer.json -> the fields ``tokenizer.ggml.*`` of a GGUF: gguf_tokenizer.py the other way round.

The fields are named here as there, without their "tokenizer.".
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from gguf import TokenType
from sentencepiece import SentencePieceProcessor

from lit_llama.cli import UserError
from lit_llama.files import read_json
from lit_llama.gguf_tokenizer import LLAMA3_NAMES, PRE_TOKENIZERS
from lit_llama.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE, Tokenizer, token_text


def sentencepiece_fields(path: Path) -> dict:
    """The fields of a tokenizer.model."""
    processor = SentencePieceProcessor(model_file=str(path))
    ids = range(processor.vocab_size())
    special = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unknown": processor.unk_id()}
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "ggml.scores": [processor.get_score(i) for i in ids],
        "ggml.token_type": [int(piece_type(processor, i)) for i in ids],
        "ggml.add_space_prefix": processor.encode("a", out_type=str)[0].startswith("▁"),
        "ggml.add_bos_token": processor.bos_id() >= 0,
        **{f"ggml.{name}_token_id": i for name, i in special.items() if i >= 0},
    }


def piece_type(processor: SentencePieceProcessor, i: int) -> TokenType:
    kinds = {"is_unknown": TokenType.UNKNOWN, "is_control": TokenType.CONTROL, "is_byte": TokenType.BYTE}
    kinds["is_unused"] = TokenType.UNUSED
    return next((kind for question, kind in kinds.items() if getattr(processor, question)(i)), TokenType.NORMAL)


def vocabulary_fields(folder: Path, rows: int) -> dict:
    """The fields of a checkpoint folder's tokenizer, one token for each of the embedding's ``rows``.

    Raises UserError for a tokenizer that llama.cpp has no equal of.
    """
    folder, tokenizer = Path(folder), Tokenizer(folder)
    path = folder / JSON_FILE
    fields = json_fields(path, tokenizer) if path.exists() else sentencepiece_fields(folder / SENTENCEPIECE_FILE)
    missing = rows - len(fields["ggml.tokens"])  # a model may have some more rows than tokens
    fields["ggml.tokens"] += [f"[PAD{rows - missing + i}]" for i in range(missing)]
    fields["ggml.token_type"] += [int(TokenType.UNUSED)] * missing
    if "ggml.scores" in fields:
        fields["ggml.scores"] += [-1e9] * missing
    fields |= {"ggml.eos_token_id": tokenizer.eos_id, "ggml.add_bos_token": tokenizer.bos_id is not None}
    settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).exists() else {}
    for name, key in {"bos": "bos", "unk": "unknown", "pad": "padding"}.items():
        token_id = tokenizer.control_id(token_text(settings.get(f"{name}_token")))
        if token_id is not None:
            fields[f"ggml.{key}_token_id"] = token_id
    if tokenizer.bos_id is not None:
        fields["ggml.bos_token_id"] = tokenizer.bos_id
    if tokenizer.chat_template is not None:
        fields["chat_template"] = tokenizer.chat_template
    return fields


def json_fields(path: Path, tokenizer: Tokenizer) -> dict:
    """The fields of a tokenizer.json: byte-level BPE, or sentencepiece's BPE."""
    content = json.loads(path.read_text(encoding="utf-8"))
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    if model.get("type") != "BPE":
        raise UserError(f"{path} is of the kind {model.get('type')!r}; a GGUF of a LLaMA has byte-pair encodings")
    names = {i: name for name, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    count = tokenizer.vocab_size
    types = [token_type(i, names, added, byte_fallback=bool(model.get("byte_fallback"))) for i in range(count)]
    fields = {"ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(count)], "ggml.token_type": types}
    if model.get("byte_fallback"):
        return {"ggml.model": "llama", "ggml.pre": "default", **fields, **sentencepiece_scores(fields, merges, content)}
    return {"ggml.model": "gpt2", "ggml.pre": pre_tokenizer(content, path), **fields, "ggml.merges": merges}


def token_type(i: int, names: dict[int, str], added: dict[int, dict], byte_fallback: bool) -> int:
    if i not in names:
        return int(TokenType.UNUSED)
    if i in added:
        is_unknown = byte_fallback and names[i] == "<unk>"
        special = TokenType.UNKNOWN if is_unknown else TokenType.CONTROL
        return int(special if added[i]["special"] else TokenType.USER_DEFINED)
    is_byte = byte_fallback and len(names[i]) == 6 and names[i].startswith("<0x")
    return int(TokenType.BYTE if is_byte else TokenType.NORMAL)
