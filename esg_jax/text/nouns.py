"""English nouns by rule: phrases for language models that have not learned to list them, and words to compare.

A phrase is a run of words between punctuation, function words and verb forms. This needs no tagger and makes a tagger's
mistakes more often: an uncommon verb without one of the endings is taken for a noun.
"""

import re

# Articles, pronouns and conjunctions; prepositions with the nouns of place that belong to them; names of pictures;
# auxiliaries, adverbs and frequent verbs of captions.
_FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any each every no all both another other such its his her their my your
    our it he she they them him we us i you me who whom whose which what where when there here one's itself
    himself herself themselves someone something anyone anything everything nothing and or but nor so yet if
    while as than because
    of in on at by with without from to into onto out off over under above below beneath beside besides between
    among behind before after around about across along against near next through toward towards inside outside
    within up down upon for during past via per like left right top bottom front back side middle center centre
    edge corner end foreground background distance
    picture image photo photograph view scene close shot
    is are was were be been being am has have had do does did can could will would may might shall should must
    not very too also just only quite really together away apart still now then again already almost ready full
    empty several sits sit sat stands stand stood walks walk runs run ran holds hold held wears wear wore rides
    ride rode plays eats eat looks look lies lie lay sees see saw goes go flies fly flew shows show shown hangs
    hang hung leans lean makes make made takes take took taken gets get got gives give given rests rest waits
    wait watches carries carry contains contain appears appear follows follow faces jumps jump swims swim drives
    drive drove driven throws throw hits hit catches catch kicks kick pulls pull pushes push reaches reach talks
    talk smiles smile poses pose sleeps sleep grazes graze drinks uses use used set sets put puts seen find
    finds found visible present available
    """.split()
)
_ING_NOUNS = frozenset(
    "building ceiling clothing painting ring string wing king swing evening morning thing awning wedding railing "
    "frosting icing topping stuffing earring spring sling ping flooring siding parking bedding living dining "
    "wrapping".split()
)
_NUMBERS = frozenset(
    "one two three four five six seven eight nine ten many few more most much lots couple pair".split()
)
_ED_NOUNS = frozenset(
    "red bed shed sled seed weed reed feed breed bred bread stuffed colored coloured striped framed".split()
)

# Words for people that may mean the same mask, as `word_stems` leaves them.
_PEOPLE = frozenset("man men woman women boy girl child children kid guy lady person peopl player".split())


def word_stems(text: str) -> set[str]:
    """Words of an English text without endings of the plural, to find out whether two texts may mean the same thing.

    Words of one or two letters and "the" say nothing and are left out; whoever a person is, "person" is among them.
    """
    found = {word.removesuffix("s").removesuffix("e") for word in re.findall(r"[a-z]{3,}", text.lower())} - {"th"}
    return found | {"person"} if found & _PEOPLE else found


def noun_phrases(text: str) -> list[str]:
    """The noun phrases of an English text in order, as they are spelled there, without articles."""
    out: list[str] = []
    run: list[re.Match] = []

    def close() -> None:
        # A number alone names nothing.
        if run and not all(match.group().lower() in _NUMBERS for match in run):
            out.append(text[run[0].start() : run[-1].end()])
        run.clear()

    position = 0
    for match in re.finditer(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text):
        # Only blanks may lie between the words of a phrase.
        if text[position : match.start()].strip():
            close()
        position = match.end()
        if _breaks(match.group().lower()):
            close()
        else:
            run.append(match)
    close()
    return out


def _breaks(word: str) -> bool:
    if word in _FUNCTION_WORDS:
        return True
    if word.endswith("ing"):
        return word not in _ING_NOUNS and "-" not in word
    if word.endswith("ed"):
        return word not in _ED_NOUNS and "-" not in word
    return word.endswith("ly") and word not in ("fly", "family", "butterfly", "belly", "jelly", "lily", "trolley")
