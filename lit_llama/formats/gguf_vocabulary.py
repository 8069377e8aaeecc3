"""The fields ``tokenizer.ggml.*`` of a GGUF from a tokenizer.model or tokenizer.json: the inverse of gguf_tokenizer.py.

Field names omit "tokenizer." here, too.
"""

import json
import re
from pathlib import Path

import tokenizers
from gguf import TokenType
from sentencepiece import SentencePieceProcessor
from tokenizers import models, pre_tokenizers

from lit_llama.common.errors import UserError
from lit_llama.formats.gguf_tokenizer import LLAMA3_NAMES, PRE_TOKENIZERS
from lit_llama.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, SentencePieceBackend, Tokenizer, read_settings


def sentencepiece_fields(path: Path) -> dict:
    """The fields of a tokenizer.model and the tokens that its folder adds."""
    backend = SentencePieceBackend(path.parent, read_settings(path.parent))
    processor, ids = backend.processor, range(backend.vocab_size)
    added = ids[processor.vocab_size() :]
    special = {
        "bos": processor.bos_id(),
        "eos": -1 if backend.eos_id is None else backend.eos_id,
        "unknown": processor.unk_id(),
    }
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [f"[PAD{i}]" if i in added and i not in backend.standalone else backend.token(i) for i in ids],
        "ggml.scores": [0.0 if i in added else processor.get_score(i) for i in ids],
        "ggml.token_type": [int(TokenType.CONTROL) if i in added else piece_type(processor, i) for i in ids],
        "ggml.add_space_prefix": processor.encode("a", out_type=str)[0].startswith("▁"),
        "ggml.add_bos_token": processor.bos_id() >= 0,
        **{f"ggml.{name}_token_id": i for name, i in special.items() if i >= 0},
    }


def piece_type(processor: SentencePieceProcessor, i: int) -> int:
    for name in ("unknown", "control", "byte", "unused"):
        if getattr(processor, f"is_{name}")(i):
            return int(TokenType[name.upper()])
    return int(TokenType.NORMAL)


def vocabulary_fields(folder: Path, rows: int, template: str | None = None) -> dict:
    """The fields of a checkpoint folder's tokenizer, with a token for each of the embedding's ``rows``.

    Raises UserError if llama.cpp has no such tokenizer.
    """
    tokenizer, path = Tokenizer(folder), folder / JSON_FILE
    fields = json_fields(path, tokenizer) if path.exists() else sentencepiece_fields(folder / SENTENCEPIECE_FILE)
    missing = rows - len(fields["ggml.tokens"])  # a model may have more rows than tokens
    fields["ggml.tokens"] += [f"[PAD{rows - missing + i}]" for i in range(missing)]
    fields["ggml.token_type"] += [int(TokenType.UNUSED)] * missing
    if "ggml.scores" in fields:
        fields["ggml.scores"] += [-1e9] * missing
    fields |= {"ggml.eos_token_id": tokenizer.eos_id, "ggml.add_bos_token": tokenizer.bos_id is not None}
    named = {"bos": tokenizer.named_id("bos") if tokenizer.bos_id is None else tokenizer.bos_id}
    named |= {"unknown": tokenizer.named_id("unk"), "padding": tokenizer.named_id("pad")}
    fields |= {f"ggml.{name}_token_id": token_id for name, token_id in named.items() if token_id is not None}
    if template := template or tokenizer.chat_template:
        fields["chat_template"] = template
    return fields


def json_fields(path: Path, tokenizer: Tokenizer) -> dict:
    """The fields of a tokenizer.json: byte-level BPE, or sentencepiece's BPE."""
    content = json.loads(path.read_text(encoding="utf-8"))
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
    fields["ggml.scores"] = scores_by_merge(tokens, merges)
    fields["ggml.add_space_prefix"] = tokens[tokenizer.encode("a")[0]].startswith("▁")
    return {"ggml.model": "llama", "ggml.pre": "default", **fields}


def scores_by_merge(tokens: list[str], merges: list[str]) -> list[float]:
    """A token's score is minus the rank of the first merge that makes it, so that scores order tokens as merges do."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def pre_tokenizer(content: dict, path: Path) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json. Raises UserError if it has none."""

    def rule(content: dict) -> tuple:
        steps = content["pre_tokenizer"] or {}
        steps = steps.get("pretokenizers", [steps])
        steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
        return steps, content["normalizer"], bool(content["model"].get("ignore_merges"))

    for name, steps in PRE_TOKENIZERS.items():
        known = tokenizers.Tokenizer(models.BPE(ignore_merges=name in LLAMA3_NAMES))
        known.pre_tokenizer = pre_tokenizers.Sequence(steps)
        if rule(content) == rule(json.loads(known.to_str())):
            return name
    raise UserError(
        f"{path} has a pre-tokenizer that is none of {', '.join(PRE_TOKENIZERS)}; "
        "export with scripts/export.py --to hf and try llama.cpp's own converter"
    )
