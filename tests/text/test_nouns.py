import pytest

from esg_jax.text.nouns import noun_phrases, word_stems


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("A dog next to two red chairs.", ["dog", "two red chairs"]),
        ("A man in a blue t-shirt is riding a horse on the beach", ["man", "blue t-shirt", "horse", "beach"]),
        ("There are two boxes on the left, a red bed and a building.", ["two boxes", "red bed", "building"]),
        ("An old train parked at the station, slowly steaming.", ["old train", "station"]),
        ("the cup", ["cup"]),
        ("Two of them, standing there", []),
        ("", []),
    ],
)
def test_noun_phrases(text, phrases):
    found = noun_phrases(text)
    assert found == phrases and all(phrase in text for phrase in found)


def test_texts_that_may_mean_the_same_share_a_word():
    assert word_stems("The two dogs") & word_stems("a dog")
    assert word_stems("an old lady") & word_stems("some people")
    assert word_stems("the benches") & word_stems("a bench")
    assert not word_stems("the red cup") & word_stems("a cap on the table")
    assert word_stems("of an ox") == set()
