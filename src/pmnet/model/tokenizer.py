"""Bytes are bytes: ids 0-255 are the byte values, special tokens start at 256."""

import os
from collections.abc import Iterable
from typing import Any

from transformers import AddedToken, PreTrainedConfig, PreTrainedTokenizer

VOCAB_SIZE = 384
PAD, BOS, EOS, PASTE, COPY = 256, 257, 258, 259, 260
MARKERS = {"<paste>": PASTE, "<copy>": COPY}  # of the tasks in `pmnet.data.tasks`
PUBLISHED_IDS = {"pad_token": 0, "bos_token": 254, "eos_token": 255}
_BYTES = {f"<0x{i:02X}>": i for i in range(256)}  # tokens of bytes
_OWN_IDS = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}


def first_id(config: PreTrainedConfig) -> int:
    """What a document begins with: the model's own BOS, which published checkpoints have at 254."""
    found: int | None = getattr(config, "bos_token_id", None)
    return BOS if found is None else found


class ByteTokenizer(PreTrainedTokenizer):
    """Byte-level tokenizer; every byte string, valid UTF-8 or not, round-trips exactly.

    Text is encoded as UTF-8 and not searched for special tokens: the characters `<bos>` are five bytes, in a chat
    template as well, unless a call says `split_special_tokens=False`. No special token is added around a text.

    Args:
        errors: what `decode` does with invalid UTF-8 (`"replace"`, `"surrogateescape"`, ...); `decode_bytes` is
            always exact.
        published_ids: the special ids of the published checkpoints (pad 0, bos 254, eos 255), which collide with
            real bytes. `encode_bytes` and `decode_bytes` still treat 0-255 as bytes.
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        errors: str = "replace",
        published_ids: bool = False,
        pad_token: str | AddedToken = "<pad>",
        bos_token: str | AddedToken = "<bos>",
        eos_token: str | AddedToken = "<eos>",
        **kwargs: object,
    ):
        self.errors, self.published_ids = errors, published_ids
        if type(self).__module__.startswith("pmnet."):  # its code is this package, wherever the files came from
            kwargs.pop("auto_map", None)
        names = {"pad_token": pad_token, "bos_token": bos_token, "eos_token": eos_token}
        saved: Any = kwargs.pop(
            "added_tokens_decoder", {}
        )  # of a tokenizer that was saved: its ids stay what they were
        kept = {token.content: i for i, token in saved.items()}
        known = _BYTES | MARKERS | kept
        usual = PUBLISHED_IDS if published_ids else _OWN_IDS
        roles = {str(names[role]): known.get(str(names[role]), i) for role, i in usual.items()}
        self._special_ids = {token: i for token, i in (kept | roles).items() if i < VOCAB_SIZE}
        self._added_tokens_decoder = {i: AddedToken(t, special=True) for t, i in self._special_ids.items()}
        self._ids = {self._convert_id_to_token(i): i for i in range(256)} | self.get_vocab()
        self._added_tokens_decoder |= {i: token for i, token in saved.items() if i >= VOCAB_SIZE}
        kwargs["split_special_tokens"] = True
        super().__init__(errors=errors, published_ids=published_ids, **names, **kwargs)

    @property
    def vocab_size(self) -> int:
        """384: 256 bytes, the special tokens, and reserved ids."""
        return VOCAB_SIZE

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added ones included, one for each id: a special token stands for the byte whose id it shares."""
        names = {i: self._convert_id_to_token(i) for i in range(VOCAB_SIZE)}
        names |= {i: token.content for i, token in self._added_tokens_decoder.items()}
        return {token: i for i, token in names.items()}

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of raw bytes, one each."""
        return list(data)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes among `ids`, exactly; ids of 256 and above are left out.

        Args:
            ids: integers or a one-dimensional tensor.
        """
        return bytes(i for i in map(int, ids) if i < 256)

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return [f"<0x{byte:02X}>" for byte in text.encode("utf-8", "surrogateescape")]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        if index < 0:
            raise ValueError(f"token id {index} is negative")
        if index < 256:
            return f"<0x{index:02X}>"
        named = {i: token for token, i in (MARKERS | self._special_ids).items()}
        return named.get(index, f"<reserved_{index}>")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens: bytes are decoded together as UTF-8, other tokens keep their names."""
        parts = [bytes([_BYTES[token]]) if token in _BYTES else token.encode() for token in tokens]
        return b"".join(parts).decode("utf-8", self.errors)

    def clean_up_tokenization(self, text: str) -> str:
        """The text itself: pipelines ask for this, and what it would usually take away are bytes of the text."""
        return text

    def save_vocabulary(self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None) -> tuple[()]:
        """Nothing to save: the vocabulary is the bytes."""
        return ()
