"""tokenizer.json and its companions in a Hugging Face folder as a GGUF's metadata."""

import re
from dataclasses import dataclass
from typing import Any

from coterie.errors import ModelError
from coterie.models.json_object import entry
from coterie.models.tokenizer import (
    BYTE,
    CONTROL,
    GPT2,
    MAX_VOCAB,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
)

WHERE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
SPACE = "▁"  # SentencePiece's
Json = dict[str, Any]


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a folder hold; {} for those that are not there. `template`: of chat_template.jinja."""

    tokenizer: Json
    settings: Json  # tokenizer_config.json
    config: Json
    generation: Json  # generation_config.json
    template: str | None = None


def tokenizer_metadata(files: TokenizerFiles, size: int) -> Json:
    """Metadata as of a GGUF for a vocabulary of `size`. Raises ModelError for what is damaged or not supported."""
    model = entry(files.tokenizer, "model", dict, WHERE)
    kind = entry(model, "type", str, WHERE)
    if kind != "BPE":
        raise ModelError(f"{WHERE}: a model of type {kind[:40]!r} is not supported, only BPE")
    added = entry(files.tokenizer, "added_tokens", list, WHERE, [])
    tokens, types = _vocabulary(entry(model, "vocab", dict, WHERE), added, size)
    ids = {token: id for id, token in enumerate(tokens) if types[id] != UNUSED}
    merges = [_merge(line) for line in entry(model, "merges", list, WHERE)]
    found: Json = {"tokens": tokens, "token_type": types, **_special_ids(files, ids)}
    found |= _begins_and_ends(files, tokens, found)
    if entry(model, "byte_fallback", bool, WHERE, False):
        found |= _sentencepiece(files.tokenizer, tokens, types, merges)
        unknown = model.get("unk_token")
        if isinstance(unknown, str) and unknown in ids:
            types[ids[unknown]], found["unknown_token_id"] = UNKNOWN, ids[unknown]
    else:
        pre = _pre(files.tokenizer, entry(model, "ignore_merges", bool, WHERE, False))
        found |= {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in merges]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    template = files.template or _template(files.settings)
    return metadata if template is None else metadata | {"tokenizer.chat_template": template}


def _vocabulary(vocab: Json, added: list[Any], size: int) -> tuple[list[str], list[int]]:
    """All tokens by number and their types. Added ones beyond `size` have no embedding, and nothing ever gives them."""
    if not 1 <= size <= MAX_VOCAB:
        raise ModelError(f"{WHERE}: a vocabulary of {size} is not supported; 1 to {MAX_VOCAB} are")
    tokens, types = [f"[PAD{id}]" for id in range(size)], [UNUSED] * size
    extra = [_added(about) for about in added]
    named = {token for token, _, _ in extra}
    for token, id in vocab.items():
        if type(id) is not int or id < 0 or (id >= size and token not in named):
            raise ModelError(
                f"{WHERE}: token {token[:40]!r} is number {repr(id)[:40]} of {size}; the files do not match"
            )
        if id < size:
            tokens[id], types[id] = token, NORMAL
    for token, id, kind in extra:
        if id < size:
            tokens[id], types[id] = token, kind
    return tokens, types


def _added(about: Any) -> tuple[str, int, int]:
    """The text, number and type of an added token."""
    where = f"{WHERE}: an added token"
    if not isinstance(about, dict):
        raise ModelError(f"{where} is {repr(about)[:40]}; download it again")
    id = entry(about, "id", int, where)
    if id < 0:
        raise ModelError(f"{where} is number {id}; download it again")
    kind = CONTROL if entry(about, "special", bool, where, False) else USER_DEFINED
    return entry(about, "content", str, where), id, kind


def _merge(line: Any) -> tuple[str, str]:
    """A merge, which is written as "a b" or as ["a", "b"]."""
    pair = line.split(" ") if isinstance(line, str) else line
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise ModelError(f"{WHERE}: the merge {repr(line)[:60]} is not of two tokens; download it again")
    return pair[0], pair[1]


# --- special tokens -------------------------------------------------------------------------------------------


def _special_ids(files: TokenizerFiles, ids: dict[str, int]) -> Json:
    """BOS and EOS by their texts or else by their numbers, and what else ends an answer."""
    found: Json = {}
    ends = [*_numbers(files.generation, "eos"), *_numbers(files.config, "eos")]
    for name, numbers in (("bos", _numbers(files.config, "bos")), ("eos", ends)):
        text = files.settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        id = ids.get(text) if isinstance(text, str) else next(iter(numbers), None)
        if id is not None:
            found[f"{name}_token_id"] = id
    others = [id for id in ends if id != found.get("eos_token_id")]
    return found | ({"eot_token_id": others[0]} if others else {})


def _numbers(table: Json, name: str) -> list[int]:
    """The token or tokens that a configuration names; whether they are in the vocabulary is seen later."""
    value = table.get(f"{name}_token_id")
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int for number in numbers):
        raise ModelError(f"'{name}_token_id' is {repr(value)[:40]}, but must be a whole number or a list of these")
    return numbers


def _begins_and_ends(files: TokenizerFiles, tokens: list[str], special: Json) -> Json:
    """Whether BOS and EOS are put around a text: tokenizer_config.json says it, or else the template that
    tokenizer.json puts around it."""
    found: Json = {}
    around = _template_tokens(entry(files.tokenizer, "post_processor", dict, WHERE, {}))
    for name, at in (("bos", 0), ("eos", -1)):
        id = special.get(f"{name}_token_id")
        put = bool(around) and id is not None and 0 <= id < len(tokens) and around[at] == tokens[id]
        found[f"add_{name}_token"] = entry(files.settings, f"add_{name}_token", bool, SETTINGS, put)
    return found


def _template_tokens(processor: Json) -> list[str]:
    """The special tokens of a template for one text, "" for the text."""
    for step in _steps(processor, "processors", "post-processor"):
        if step.get("type") == "TemplateProcessing":
            parts = [each for each in entry(step, "single", list, WHERE) if isinstance(each, dict)]
            return [
                str(token.get("id")) if isinstance(token := each.get("SpecialToken"), dict) else "" for each in parts
            ]
    return []


def _template(settings: Json) -> str | None:
    """The chat template, of several the one named default."""
    value = settings.get("chat_template")
    if isinstance(value, list):
        value = next(
            (each.get("template") for each in value if isinstance(each, dict) and each.get("name") == "default"), None
        )
    return value if isinstance(value, str) else None


# --- how text is cut ------------------------------------------------------------------------------------------


def _steps(whole: Any, parts: str, what: str) -> list[Json]:
    """The steps of a sequence, or the only one; null is none."""
    if whole is None or whole == {}:
        return []
    steps = whole.get(parts) if isinstance(whole, dict) and whole.get("type") == "Sequence" else [whole]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ModelError(f"{WHERE}: the {what} is damaged; download it again")
    return steps


def _pre(tokenizer: Json, ignore_merges: bool) -> str:
    """The pre-tokenizer's name among those that the tokenizer knows. `ignore_merges`: a word that is a token is one."""
    if _steps(tokenizer.get("normalizer"), "normalizers", "normalizer"):
        raise ModelError(f"{WHERE}: a normalizer beside byte-level BPE is not supported")
    *cuts, last = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers", "pre-tokenizer") or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is True:
        raise ModelError(
            f"{WHERE}: the pre-tokenizer {repr(last)[:60]} is not supported, only ByteLevel without prefix"
        )
    patterns = (*map(_pattern, cuts), *([] if last.get("use_regex") is False else [GPT2]))
    for name, known in PRE_TOKENIZERS.items():
        if known == patterns and (name in WHOLE_WORDS) == ignore_merges:
            return name
    raise ModelError(f"{WHERE}: the pre-tokenizer that cuts by {' and '.join(patterns)[:120]!r} is not supported")


def _pattern(step: Json) -> str:
    match step:
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"} if not step.get("invert"):
            return pattern
        case {"type": "Digits", "individual_digits": True}:
            return r"\p{N}"
    raise ModelError(f"{WHERE}: the pre-tokenizer {repr(step)[:80]} is not supported")


def _sentencepiece(tokenizer: Json, tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> Json:
    """Kind "llama". The best score is that of what is merged first; marks the tokens that stand for bytes."""
    prefix = False
    for step in _steps(tokenizer.get("normalizer"), "normalizers", "normalizer"):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case _:
                raise ModelError(f"{WHERE}: the normalizer {repr(step)[:80]} is not supported")
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers", "pre-tokenizer"):
        if step.get("type") != "Metaspace" or step.get("replacement") != SPACE:
            raise ModelError(f"{WHERE}: the pre-tokenizer {repr(step)[:80]} is not supported")
        prefix = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    for id, token in enumerate(tokens):
        if types[id] == NORMAL and BYTE_TOKEN.fullmatch(token):
            types[id] = BYTE
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    return {"model": "llama", "scores": scores, "add_space_prefix": prefix}
