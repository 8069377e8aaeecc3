"""Write a tokenizer.json from the vocabulary in a GGUF file.

The fields ``tokenizer.ggml.*`` (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) hold the tokens, their types
and either merges ("gpt2", byte-level BPE: Llama 3, SmolLM2) or scores ("llama", sentencepiece BPE: LLaMA 1 and 2). The
pre-tokenizer, which splits the text before the merges, is only named; llama.cpp defines it.
"""

from pathlib import Path

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lit_llama.common.errors import UserError
from lit_llama.common.files import atomic_write, write_json
from lit_llama.tokenizer import JSON_FILE, SETTINGS_FILE

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


def write_gguf_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of an opened GGUF."""
    names = {key: key.removeprefix("tokenizer.") for key in reader.fields if key.startswith("tokenizer.")}
    write_tokenizer({name: reader.fields[key].contents() for key, name in names.items()}, folder)


def write_tokenizer(meta: dict, folder: Path, legacy: bool = True) -> None:
    """Write tokenizer.json and tokenizer_config.json for the fields ``meta``, named without "tokenizer.".

    With ``legacy``, sentencepiece also puts a space after a control token.

    Raises UserError if the kind of tokenizer or pre-tokenizer is unknown, or if fields are missing or inconsistent.
    """
    model, tokens = meta.get("ggml.model"), meta.get("ggml.tokens", [])
    if model not in ("gpt2", "llama"):
        raise UserError(f"the GGUF's tokenizer is of kind {model!r}; known kinds: gpt2, llama")
    types = meta.get("ggml.token_type", [TokenType.NORMAL] * len(tokens))
    if not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(f"the GGUF's {len(tokens)} tokens and {len(types)} token types do not form a vocabulary")
    settings = special_tokens(tokens, meta)

    tokenizer = byte_level(tokens, meta) if model == "gpt2" else sentencepiece(tokens, types, settings, meta, legacy)
    for token, kind in zip(tokens, types, strict=True):
        if kind in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED):
            special = kind != TokenType.USER_DEFINED  # user-defined tokens are found in text
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])
    if settings["add_bos_token"]:
        bos = settings["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing([bos, "$A"], None, [(bos, tokens.index(bos))])

    with atomic_write(folder / JSON_FILE) as temporary:
        tokenizer.save(str(temporary))
    write_json(folder / SETTINGS_FILE, {"tokenizer_class": "PreTrainedTokenizerFast", **settings})


def special_tokens(tokens: list[str], meta: dict) -> dict:
    """The content of tokenizer_config.json, with llama.cpp's defaults for missing fields."""
    is_llama = meta["ggml.model"] == "llama"
    settings = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token_id = meta.get(f"ggml.{key}_token_id", LLAMA_IDS.get(key) if is_llama else None)
        if token_id is not None:
            if token_id >= len(tokens):
                raise UserError(f"the GGUF's {key} token is {token_id}, but it has {len(tokens)} tokens")
            settings[f"{name}_token"] = tokens[token_id]
    wants_bos = meta.get("ggml.add_bos_token", is_llama or meta.get("ggml.pre") in LLAMA3_NAMES)
    settings["add_bos_token"] = bool(wants_bos) and "bos_token" in settings
    if "chat_template" in meta:
        settings["chat_template"] = meta["chat_template"]
    return settings


def byte_level(tokens: list[str], meta: dict) -> Tokenizer:
    """Byte-level BPE (GPT-2's) with the file's merges."""
    pre = meta.get("ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"the GGUF's pre-tokenizer is {pre!r}; known ones: {', '.join(PRE_TOKENIZERS)}. "
            "Convert the model's safetensors and tokenizer.json instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("ggml.merges", [])]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:  # Llama 3 does not split a word that is a token
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in LLAMA3_NAMES))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"the GGUF's {len(merges)} merges do not fit its {len(tokens)} tokens: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(tokens: list[str], types: list[int], settings: dict, meta: dict, legacy: bool) -> Tokenizer:
    """Sentencepiece's BPE: no pre-tokenizer, spaces as U+2581, one of them in front, unknown characters as bytes."""
    scores = meta.get("ggml.scores", [])
    if len(scores) != len(tokens):
        raise UserError(f"the GGUF has {len(tokens)} tokens but {len(scores)} scores")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = merges_by_score(tokens, types, scores)
    unknown = settings["unk_token"]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(meta.get("ggml.add_space_prefix", True))
    if legacy or not prefix:
        spaces = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer


def merges_by_score(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
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
