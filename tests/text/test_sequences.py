import numpy as np
import pytest

from esg_jax.text.prompts import Prompts, Special
from esg_jax.text.sequences import SequenceBuilder, Turn, bucket_length, locate, pad_sequences
from esg_jax.text.tokenizers import GgufTokenizer
from tests.text.byte_tokenizer import ByteTokenizer


class PrefixSpaceTokenizer(ByteTokenizer):
    """Puts a space before every text and takes it away again, as SentencePiece does."""

    prefix_space = True

    def encode(self, text):
        return super().encode(" " + text)

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


TOKENIZERS = [ByteTokenizer(), PrefixSpaceTokenizer()]
STYLES = ["vicuna", "chatml"]


@pytest.fixture(params=STYLES)
def prompts(request):
    return Prompts.load(conversation=request.param)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_training_ids_equal_prompt_plus_generated_ids(tokenizer, prompts):
    """What generation continues from and what it should write are together what training sees (spec 5.4)."""
    builder = SequenceBuilder(tokenizer, prompts, 4)
    answer = prompts.list_answer(["a dog", "the red ball, wet", "grass"])
    trained = builder.build([Turn("Which things?", answer)])
    prompt = builder.build([Turn("Which things?")])
    generated = trained.ids[len(prompt) :]
    np.testing.assert_array_equal(trained.ids[: len(prompt)], prompt.ids)
    assert not trained.answer[: len(prompt)].any() and trained.answer[len(prompt) :].all()
    # ids -> pieces -> ids, and ids -> phrases -> answer -> ids.
    assert builder.encode(builder.decode(generated)) == generated.tolist()
    padded = [*generated.tolist(), tokenizer.pad_id, tokenizer.pad_id]
    again = builder.build([Turn("Which things?", prompts.list_answer(builder.phrases(padded)))])
    np.testing.assert_array_equal(again.ids, trained.ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_vicuna_layout(tokenizer):
    builder = SequenceBuilder(tokenizer, Prompts.load(), 3)
    ids = builder.build([Turn("Q?", "Yes.")]).ids.tolist()
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    place = ids.index(tokenizer.image_id)
    assert ids[place : place + 3] == [tokenizer.image_id] * 3 and ids.count(tokenizer.image_id) == 3
    assert bytes(ids[1:place]).decode().endswith("USER: ")
    space = " " if tokenizer is TOKENIZERS[1] else ""
    assert bytes(ids[place + 3 : -1]).decode() == f"{space}\nQ? ASSISTANT: Yes."


def test_turns_answers_and_seg_positions(prompts):
    tokenizer = ByteTokenizer()
    builder = SequenceBuilder(tokenizer, prompts, 2)
    turns = [Turn("What is it?", "A dog."), Turn("Which?", prompts.list_answer(["a dog", "a ball"])), Turn("And?")]
    sequence = builder.build(turns)
    assert (sequence.ids == tokenizer.image_id).sum() == 2  # in the first turn only
    assert (sequence.ids[sequence.seg_pos] == tokenizer.seg_id).all() and len(sequence.seg_pos) == 2
    assert sequence.answer[sequence.seg_pos].all() and not sequence.answer[-1]
    answered = builder.decode(sequence.ids[sequence.answer])
    assert [piece for piece in answered if isinstance(piece, Special)] == [
        Special.EOS, Special.SEG, Special.SEG, Special.EOS,
    ]  # fmt: skip
    # The second turn begins where a conversation of the first alone ends.
    first = builder.build(turns[:1]).ids
    np.testing.assert_array_equal(sequence.ids[: len(first)], first)
    assert (builder.build(turns, image=False).ids != tokenizer.image_id).all()


def test_text_of_an_answer():
    builder = SequenceBuilder(ByteTokenizer(), Prompts.load(), 1)
    ids = builder.build([Turn("Q", Prompts.load().list_answer(["a dog", "sand", "a cat"]))])
    assert builder.text(ids.ids[ids.answer]) == "It mentions three things: a dog, sand and a cat."


def test_special_names_in_content_stay_text():
    builder = SequenceBuilder(ByteTokenizer(), Prompts.load(), 1)
    sequence = builder.build([Turn("a <seg> <image>?", "no <eos> <seg>")])
    assert len(sequence.seg_pos) == 0 and (sequence.ids == ByteTokenizer.image_id).sum() == 1


def test_padding():
    builder = SequenceBuilder(ByteTokenizer(), Prompts.load(), 1)
    answer = Prompts.load().list_answer(["a", "b"])
    sequences = [builder.build([Turn("one?", answer)]), builder.build([Turn("a longer one?", "None.")])]
    batch = pad_sequences(sequences, 256, 3, ByteTokenizer.pad_id)
    assert batch["ids"].shape == (2, 256) and batch["ids"].dtype == np.int32
    for row, sequence in enumerate(sequences):
        np.testing.assert_array_equal(batch["ids"][row, : len(sequence)], sequence.ids)
        assert (batch["ids"][row, len(sequence) :] == ByteTokenizer.pad_id).all()
        assert batch["answer"][row].sum() == sequence.answer.sum()
    np.testing.assert_array_equal(batch["seg_valid"], [[True, True, False], [False] * 3])
    np.testing.assert_array_equal(batch["seg_pos"][0, :2], sequences[0].seg_pos)
    with pytest.raises(ValueError, match="2 phrases, more than the 1"):
        pad_sequences(sequences, 256, 1, ByteTokenizer.pad_id)
    with pytest.raises(ValueError, match=f"takes {len(sequences[0])} tokens with its picture, more than the 64"):
        pad_sequences(sequences, 64, 3, ByteTokenizer.pad_id)
    assert [bucket_length(n, (64, 256)) for n in (1, 64, 65)] == [64, 64, 256]


def test_bad_conversations():
    builder = SequenceBuilder(ByteTokenizer(), Prompts.load(), 1)
    with pytest.raises(ValueError, match="turn 1 of 2 has no answer"):
        builder.build([Turn("a"), Turn("b")])
    with pytest.raises(ValueError, match="question of turn 2 is empty"):
        builder.build([Turn("a", "b"), Turn(" ")])
    with pytest.raises(ValueError, match="at least one turn"):
        builder.build([])
    with pytest.raises(ValueError, match="num_image_tokens is 0"):
        SequenceBuilder(ByteTokenizer(), Prompts.load(), 0)


def test_locate():
    text = "A man and a woman: the man holds a manual."
    assert locate(text, ["a man", "a woman", "the man", "manual", "dog"]) == [
        (0, 5), (10, 17), (19, 26), (35, 41), None,
    ]  # fmt: skip
    assert locate(text, ["manual", "a man"]) == [(35, 41), (0, 5)]


def test_the_packaged_tokenizer(prompts, smollm2_path):
    """The same property with a real byte-level BPE."""
    builder = SequenceBuilder(GgufTokenizer(smollm2_path), prompts, 49)
    phrases = ["two red dogs", "12 cups on the left", "crème brûlée"]
    trained = builder.build([Turn("Which things?", prompts.list_answer(phrases))])
    generated = trained.ids[len(builder.build([Turn("Which things?")])) :].tolist()
    assert builder.phrases(generated) == phrases
    assert builder.encode(builder.decode(generated)) == generated
