import re

import pytest

from esg_jax.text.prompts import Prompts, Special, number_word, split_specials


def test_number_words():
    assert [number_word(n) for n in (1, 13, 40, 99, 100, 133, 1000)] == [
        "one", "thirteen", "forty", "ninety-nine", "one hundred", "one hundred thirty-three", "1000",
    ]  # fmt: skip


def test_list_answers():
    prompts = Prompts.load()
    assert prompts.list_answer(["a dog", "two red balls", "grass"]) == [
        "It mentions three things: a dog", Special.SEG, ", two red balls", Special.SEG, " and grass", Special.SEG, ".",
    ]  # fmt: skip
    assert prompts.list_answer(["a dog"]) == ["It mentions one thing: a dog", Special.SEG, "."]
    assert prompts.list_answer([]) == ["It mentions no things."]
    assert prompts.list_answer(["a", "b"], with_count=False) == ["a", Special.SEG, " and b", Special.SEG, "."]
    assert prompts.reasoning_answer() == [Special.SEG]
    assert prompts.reasoning_answer("the cup") == ["The answer is the cup", Special.SEG, "."]


@pytest.mark.parametrize(
    "phrases", [["a dog"], ["a dog", "sand and water"], ["andirons", "Two cats", "and", "t-shirt"]]
)
@pytest.mark.parametrize("with_count", [True, False])
def test_phrases_come_back(phrases, with_count):
    prompts = Prompts.load()
    assert prompts.phrases_of(prompts.list_answer(phrases, with_count=with_count)) == phrases


def test_conversation_styles():
    vicuna, chatml = Prompts.load(), Prompts.load(conversation="chatml")
    assert vicuna.user("Why?", image=True) == ["USER: ", Special.IMAGE, "\nWhy? ASSISTANT:"]
    assert vicuna.answer(["So."]) == [" So.", Special.EOS]
    assert chatml.user("Why?", image=False) == [
        Special.BOS, "user\nWhy?", Special.EOS, "\n", Special.BOS, "assistant\n",
    ]  # fmt: skip


def test_content_is_never_parsed():
    question = "{image} <seg> <image> {question}"
    assert Prompts.load().user(question, image=False) == [f"USER: {question} ASSISTANT:"]
    assert "{names}" in Prompts.load().extraction_question("a {names} {text}")
    assert split_specials("<seg>a<eos><seg>") == [Special.SEG, "a", Special.EOS, Special.SEG]


def test_category_sentence():
    assert Prompts.load().category_sentence(["cat", "sky", "rug"]) == "The picture may contain cat, sky and rug."


def test_override(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("conversations: {vicuna: {system: Be brief.}}\nquestions: {description: ['What?']}\n")
    prompts = Prompts.load(file)
    assert prompts.start() == [Special.BOS, "Be brief. "]
    assert prompts.description == ("What?",) and prompts.extraction == Prompts.load().extraction


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("answers: {phrase: 'no field'}", "answers.phrase is 'no field'; it must have {phrase}"),
        ("answers: {frase: x}", "unknown entry answers.frase"),
        ("questions: {extraction: ['{image}']}", "questions.extraction is '{image}'; it must have {text}"),
        ("questions: {description: []}", "questions.description must be a list"),
        ("[1, 2]", "must hold the sections"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        Prompts.load(file)


def test_missing_file_and_conversation(tmp_path):
    with pytest.raises(FileNotFoundError, match="file of prompts not found"):
        Prompts.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="has no conversation 'alpaca'; it has chatml, vicuna"):
        Prompts.load(conversation="alpaca")
