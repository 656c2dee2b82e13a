"""Tokenizers against an independent implementation of byte-level BPE, and what training relies on."""

import io

import numpy as np
import pytest

from esg_jax.text.gguf_file import GgufFile
from esg_jax.text.prompts import Prompts
from esg_jax.text.sequences import SequenceBuilder, Turn
from esg_jax.text.tokenizers import GgufTokenizer, JsonTokenizer, SentencePieceTokenizer, open_tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "Hello world",
    "It's the dog's ball, they're sure we'll see.  Don't!",
    "  two  leading and   three inner spaces, trailing  ",
    "tabs\tand\nnew\n\nlines \n mixed\r\n",
    "12345 x7y89  42 ½ ٣ Ⅷ 1,234.56 ３",
    "é ü ñ café naïve Ünïcödé e\u0301",
    "漢字 かな 한국어 עברית العربية हिन्दी",
    "🙂 👩‍👩‍👧 🇩🇪 \u200d\ufeff\u00a0\u3000end",
    "<|im_start|>user <SEG> </s> <image> <|endoftext|>",
    "a" * 70 + "_" * 9 + "==>$%&",
    "",
]
CORPUS = "a dog and the red ball on green grass. which things does the sentence mention? it shows a dog."


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return GgufTokenizer(smollm2_path)


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    """A small model with LLaMA's settings."""
    library = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """A byte-level BPE with LLaMA's special pieces."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["smollm2", "sentence_piece", "json"])
def tokenizer(request):
    if request.param == "json":
        return JsonTokenizer(request.getfixturevalue("json_file"))
    return request.getfixturevalue(request.param)


class PlainBpe:
    """Byte-level BPE as GPT-2's paper describes it, with llama.cpp's two splits for SmolLM: digits, then words."""

    def __init__(self, metadata):
        regex = pytest.importorskip("regex")
        self.ids = {piece: index for index, piece in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = metadata["tokenizer.ggml.merges"]
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.digits = regex.compile(r"\p{N}|\P{N}+")
        self.words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.alphabet = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

    def encode(self, text):
        words = (word for part in self.digits.findall(text) for word in self.words.findall(part))
        return [self.ids[piece] for word in words for piece in self.merge(word)]

    def merge(self, word):
        pieces = [self.alphabet[byte] for byte in word.encode()]
        while len(pieces) > 1:
            ranks = [self.ranks.get(pair, np.inf) for pair in zip(pieces, pieces[1:], strict=False)]
            best = int(np.argmin(ranks))
            if ranks[best] == np.inf:
                break
            pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
        return pieces


def random_texts(count):
    rng = np.random.default_rng(0)
    ranges = [(32, 127), (0xA0, 0x250), (0x370, 0x530), (0x2000, 0x2070), (0x4E00, 0x4F00), (0x1F300, 0x1F600), (9, 14)]
    for _ in range(count):
        picks = rng.integers(0, len(ranges), rng.integers(1, 40))
        yield "".join(chr(rng.integers(*ranges[pick])) for pick in picks)


def test_smollm2_ids_equal_plain_bpe(smollm2_path, smollm2):
    reference = PlainBpe(GgufFile(smollm2_path).metadata)
    for text in [*TEXTS, *random_texts(200)]:
        assert smollm2.encode(text) == reference.encode(text), repr(text)


def test_smollm2_known_ids(smollm2):
    """Ids of the published tokenizer."""
    assert smollm2.encode("Hello world") == [19556, 905]
    assert (smollm2.bos_id, smollm2.eos_id) == (1, 2)
    ids = smollm2.image_id, smollm2.pad_id, smollm2.seg_id, smollm2.vocab_size
    assert ids == (49152, 49153, 49154, 49155)


def test_text_survives(tokenizer):
    for text in [*TEXTS, *random_texts(50)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text, repr(text)


def test_text_never_becomes_a_special_token(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= token < tokenizer.num_pieces for token in ids)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_decode_leaves_special_tokens_out(tokenizer):
    a, b = tokenizer.encode("a dog"), tokenizer.encode("the ball")
    special = [tokenizer.bos_id, tokenizer.image_id, tokenizer.seg_id, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(np.array([*special[:2], *a, *special[2:]])) == "a dog"
    assert tokenizer.decode([*a, tokenizer.seg_id, *b]) == tokenizer.decode([*a, *b])
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("style", ["vicuna", "chatml"])
def test_training_ids_equal_prompt_plus_generated_ids(tokenizer, style):
    prompts = Prompts.load(conversation=style)
    builder = SequenceBuilder(tokenizer, prompts, 4)
    answer = prompts.list_answer(["a dog", "the red ball", "the green grass"])
    trained = builder.build([Turn("Which things?", answer)])
    prompt = builder.build([Turn("Which things?")])
    np.testing.assert_array_equal(trained.ids[: len(prompt)], prompt.ids)
    generated = trained.ids[len(prompt) :].tolist()
    assert builder.encode(builder.decode(generated)) == generated
    assert builder.phrases(generated) == ["a dog", "the red ball", "the green grass"]


def test_sentence_piece_puts_a_space_before_the_text(sentence_piece):
    assert sentence_piece.prefix_space
    pieces = [sentence_piece._processor.IdToPiece(token) for token in sentence_piece.encode("dog")]
    assert "".join(pieces) == "\u2581dog"
    assert (sentence_piece.bos_id, sentence_piece.eos_id) == (1, 2)
    assert (sentence_piece.image_id, sentence_piece.pad_id, sentence_piece.seg_id) == (300, 301, 302)


def test_json_tokenizer_knows_whether_it_adds_a_space(json_file, tmp_path):
    assert not JsonTokenizer(json_file).prefix_space
    raw = tokenizers.Tokenizer.from_file(str(json_file))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert JsonTokenizer(tmp_path).prefix_space


def test_json_tokenizer_refuses_tokens_in_the_place_of_ours(json_file, tmp_path):
    raw = tokenizers.Tokenizer.from_file(str(json_file))
    raw.add_tokens(["<region>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="'<region>' with id 300"):
        JsonTokenizer(tmp_path)
    with pytest.raises(ValueError, match="lacks the piece '<bos>'"):
        JsonTokenizer(json_file, bos="<bos>")


def test_files_open_by_kind_and_bad_ones_name_themselves(sentence_piece, json_file, tmp_path):
    assert isinstance(open_tokenizer(json_file.parent), JsonTokenizer)
    with pytest.raises(FileNotFoundError, match="neither tokenizer.model nor"):
        open_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent.json"):
        open_tokenizer(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="words.txt: a tokenizer file ends in"):
        open_tokenizer(tmp_path / "words.txt")
    for name in ("bad.json", "bad.model", "bad.gguf"):
        (tmp_path / name).write_bytes(b"{not a tokenizer")
        with pytest.raises(ValueError, match=name):
            open_tokenizer(tmp_path / name)
