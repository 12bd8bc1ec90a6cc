"""Text to tokens and back, from the vocabulary inside a GGUF file.

Two kinds: byte-level BPE ("gpt2": SmolLM2, Llama 3) and SentencePiece ("llama": Gemma, Mistral, Llama 2).
The merging is done by the `tokenizers` package; special tokens are cut out before, as llama.cpp does it.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from coterie.errors import ModelError, UsageError

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_VOCAB = 1 << 20
MAX_TOKEN_CHARS = 1 << 9
MAX_PROMPT_CHARS = 1 << 23  # beyond any context, and within what the regex engine can search

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut into words before merging, by tokenizer.ggml.pre. Each pattern cuts what is left.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "megrez", "deepseek-r1-qwen"), (LLAMA3.replace("{1,3}", ""),)),
    "tekken": (TEKKEN,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# Families that take a word which is a token as it is, and that begin with BOS unless told otherwise.
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"}

END_TEXTS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
    "<eos>", "</s>", "<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>",
)  # fmt: skip


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: themselves where Latin-1 prints them, else from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A vocabulary and its rules. `bos` and `eos` are token ids or None; `end_ids` end an answer."""

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> "Tokenizer":
        """Build from a GGUF file's metadata; ModelError if they are damaged or of an unknown kind."""
        return cls(metadata)

    def __init__(self, metadata: dict[str, Any]) -> None:
        kind = metadata.get("tokenizer.ggml.model")
        if kind not in ("gpt2", "llama"):
            raise ModelError(f"tokenizer kind {str(kind)[:40]!r} is not supported, only 'gpt2' and 'llama'")
        self.sentencepiece = kind == "llama"
        self._tokens: Sequence[str] = _list(metadata, "tokens", str)
        self.vocab_size = len(self._tokens)
        if not 1 <= self.vocab_size <= MAX_VOCAB:
            raise ModelError(f"the tokenizer has {self.vocab_size} tokens; 1 to {MAX_VOCAB} are supported")
        if max(map(len, self._tokens)) > MAX_TOKEN_CHARS:
            raise ModelError(f"the tokenizer has a token of more than {MAX_TOKEN_CHARS} characters")
        ids = {token: i for i, token in enumerate(self._tokens)}
        types: list[int] = _list(metadata, "token_type", int, self.vocab_size, NORMAL)
        ends = [ids[text] for text in END_TEXTS if text in ids]
        for end in ends:
            types[end] = CONTROL
        self._types = bytes(kind if 0 < kind < 256 else UNKNOWN for kind in types)

        pre = str(metadata.get("tokenizer.ggml.pre", "default"))
        begins = self.sentencepiece or pre in WHOLE_WORDS
        self.bos = self._special_id(metadata, "bos", 1 if self.sentencepiece else None)
        self.eos = self._special_id(metadata, "eos", 2 if self.sentencepiece else None)
        eot = self._special_id(metadata, "eot", None)
        self.end_ids = frozenset(ends) | {end for end in (self.eos, eot) if end is not None}
        self._add_bos = _flag(metadata, "add_bos_token", begins) and self.bos is not None
        self._add_eos = _flag(metadata, "add_eos_token", False) and self.eos is not None
        self._space_prefix = self.sentencepiece and _flag(metadata, "add_space_prefix", True)

        # Longest first: "<|end|>" must not be taken out of a longer special token.
        cut_out = (CONTROL, UNKNOWN, USER_DEFINED)
        special = [i for i, kind in enumerate(self._types) if kind in cut_out and self._tokens[i]]
        special.sort(key=lambda i: -len(self._tokens[i].encode()))
        self._special = [(self._tokens[i], i) for i in special]
        self._user_defined = [(self._tokens[i], i) for i in special if self._types[i] == USER_DEFINED]
        if self.sentencepiece:
            self._unknown = self._special_id(metadata, "unknown", 0)
            scores = _list(metadata, "scores", float, self.vocab_size)
            if not all(map(math.isfinite, scores)):
                raise ModelError("tokenizer.ggml.scores holds one that is not a number; the file is damaged")
            self._scores = array("f", scores)  # a vocabulary of 262,144 is large: keep no objects
            self._merger = self._score_merger(ids, ascii_only=True)
            self._ascii_only = True
        else:
            self._merger = self._rank_merger(pre, ids, _list(metadata, "merges", str))
        self._tokens = _Strings(self._tokens)

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        `add_bos`: begin with BOS; None does what the model says (also about EOS at the end). Without
        `parse_special`, text such as "<|im_end|>" is text and not a control token. UsageError for text that
        is not Unicode, or longer than any context.
        """
        if len(text) > MAX_PROMPT_CHARS:
            raise UsageError(f"the text has {len(text)} characters; give at most {MAX_PROMPT_CHARS}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not Unicode at character {error.start}; check its encoding") from None
        ids: list[int] = []
        if self.bos is not None and (self._add_bos if add_bos is None else add_bos):
            ids.append(self.bos)
        after_special = True
        for piece in _cut_out(text, self._special if parse_special else self._user_defined):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._merge((" " if self._space_prefix and after_special else "") + piece)
            after_special = isinstance(piece, int)
        if self.eos is not None and self._add_eos and add_bos is None:
            ids.append(self.eos)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, control tokens left out; bytes that are not UTF-8 become U+FFFD."""
        data = b"".join(map(self.token_bytes, ids))
        if self._space_prefix:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token stands for: b"" for control tokens, perhaps a part of a UTF-8 character."""
        text, kind = self.token_text(id), self._types[id]
        if kind in (CONTROL, UNKNOWN, UNUSED):
            return b""
        if kind == BYTE:
            return _byte_of(text)
        if self.sentencepiece:
            return text.replace("▁", " ").encode()
        if kind == USER_DEFINED:
            return text.encode()
        return b"".join(bytes([BYTE_OF[char]]) if char in BYTE_OF else char.encode() for char in text)

    def token_text(self, id: int) -> str:
        """A token as the vocabulary spells it."""
        if not 0 <= id < self.vocab_size:
            raise UsageError(f"token {id} is not in the vocabulary of {self.vocab_size}")
        return self._tokens[id]

    def _merge(self, text: str) -> list[int]:
        if self.sentencepiece:
            text = text.replace(" ", "▁")
            if self._ascii_only and not _is_ascii(text):
                self._tokens = list(self._tokens)
                ids = {token: i for i, token in enumerate(self._tokens)}
                self._merger, self._ascii_only = self._score_merger(ids, ascii_only=False), False
                self._tokens = _Strings(self._tokens)
        found: list[int] = self._merger.encode(text, add_special_tokens=False).ids
        return found

    def _special_id(self, metadata: dict[str, Any], name: str, default: int | None) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        id = metadata.get(key, default if default is not None and default < self.vocab_size else None)
        if id is not None and (type(id) is not int or not 0 <= id < self.vocab_size):
            raise ModelError(f"{key} is {str(id)[:40]!r}, which is none of the {self.vocab_size} tokens")
        return id

    def _rank_merger(self, pre: str, ids: dict[str, int], lines: list[str]) -> "tokenizers.Tokenizer":
        """Byte-level BPE: merges come in the order of their rank."""
        import tokenizers
        from tokenizers import models, pre_tokenizers

        if pre not in PRE_TOKENIZERS:
            raise ModelError(f"pre-tokenizer {pre[:40]!r} is not supported; known are {', '.join(PRE_TOKENIZERS)}")
        pairs: dict[tuple[str, str], None] = {}
        for line in lines:
            left, _, right = line.partition(" ")
            if not (left in ids and right in ids and left + right in ids):
                raise ModelError(f"the merge {line[:60]!r} is not of known tokens; the file is damaged")
            pairs[left, right] = None
        merger = tokenizers.Tokenizer(models.BPE(ids, list(pairs), ignore_merges=pre in WHOLE_WORDS))
        cuts: Sequence[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]
        ]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        merger.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
        return merger

    def _score_merger(self, ids: dict[str, int], ascii_only: bool) -> "tokenizers.Tokenizer":
        """SentencePiece as BPE: each way to put a token together from two is a merge, best score first.

        With `ascii_only`, tokens that ASCII text cannot contain are left out: the result is the same for
        such text, and a vocabulary of 262,144 is ready in a third of the time.
        """
        import tokenizers
        from tokenizers import models

        tokens = self._tokens
        chosen = [i for i, token in enumerate(tokens) if not ascii_only or _is_ascii(token)]
        chosen.sort(key=lambda i: -self._scores[i])
        # Pairs of the vocabulary's own strings, not of copies: there are half a million.
        merges = [
            (tokens[left], tokens[right])
            for token in map(tokens.__getitem__, chosen)
            for cut in range(len(token) - 1, 0, -1)
            if (left := ids.get(token[:cut])) is not None and (right := ids.get(token[cut:])) is not None
        ]
        vocab = {tokens[i]: i for i in chosen}
        unknown = None if self._unknown is None else tokens[self._unknown]
        if unknown is not None:
            vocab[unknown] = ids[unknown]
        return tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, byte_fallback=True))


class _Strings(Sequence[str]):
    """Strings in one piece of memory: objects of their own cost a large vocabulary 20 MB."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self._bytes = b"".join(encoded)
        self._ends = array("Q", accumulate(map(len, encoded), initial=0))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> Any:
        i = range(len(self))[i]
        return self._bytes[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogatepass")


def _cut_out(text: str, special: list[tuple[str, int]]) -> list[str | int]:
    """`text` with every occurrence of a special token replaced by its id."""
    pieces: list[str | int] = [text] if text else []
    for token, id in special:
        if token not in text:
            continue
        cut: list[str | int] = []
        for piece in pieces:
            if isinstance(piece, int):
                cut.append(piece)
                continue
            first, *rest = piece.split(token)
            cut += [first] if first else []
            for part in rest:
                cut += [id, part] if part else [id]
        pieces = cut
    return pieces


def _is_ascii(text: str) -> bool:
    return text.replace("▁", "").isascii()


def _byte_of(text: str) -> bytes:
    """The byte that "<0x0A>" stands for."""
    try:
        return bytes([int(text.removeprefix("<0x").removesuffix(">"), 16)])
    except ValueError:
        return text.encode()


def _list(metadata: dict[str, Any], name: str, kind: type, size: int | None = None, default: Any = None) -> list[Any]:
    """The array tokenizer.ggml.<name>: elements of `kind`, `size` of them; or `size` times the default."""
    key = f"tokenizer.ggml.{name}"
    values = metadata.get(key)
    if values is None and default is not None and size is not None:
        return [default] * size
    if not isinstance(values, list) or not set(map(type, values)) <= {kind}:
        raise ModelError(f"metadata {key!r} is no array of {kind.__name__}; the file is damaged")
    if size is not None and len(values) != size:
        raise ModelError(f"metadata {key!r} has {len(values)} values for {size} tokens; the file is damaged")
    return values.copy()


def _flag(metadata: dict[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise ModelError(f"metadata 'tokenizer.ggml.{name}' is {str(value)[:40]!r}, not true or false")
    return value


def chunks_of(tokens: list[int], begin: list[int], size: int) -> list[list[int]]:
    """A text's chunks of `size` tokens, what is left over dropped; each begins with `begin` (BOS, or nothing), which
    takes the place of its first tokens."""
    starts = range(0, len(tokens) - size + 1, size)
    return [begin + tokens[start + len(begin) : start + size] for start in starts]
