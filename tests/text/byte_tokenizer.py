"""The simplest tokenizer that tests of text can do with."""


class ByteTokenizer:
    """One id per byte; special ids after them."""

    bos_id, eos_id, pad_id, image_id, seg_id, vocab_size = 256, 257, 258, 259, 260, 272

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")
