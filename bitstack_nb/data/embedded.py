"""Synthetic text for the five tasks: no download, and the same rows on every machine.

Scope: a small seeded grammar writes labelled texts with the column names, labels and row order of
the Hub's datasets. The five tasks share one word list, so that learning one disturbs the others.
Words and punctuation are in lower case with single spaces between them, so splitting at spaces is
a complete tokenizer. Results on these rows must be called synthetic.
"""

from __future__ import annotations

import random

import datasets

EMBEDDED_VERSION = "1"  # recorded with every run: raise it when any text changes
EMBEDDED_ROWS = {"train": 2000, "test": 500}

_THEMES = {
    "politics": "election minister senate vote law treaty president party reform council",
    "conflict": "army border troops attack peace rebel hostage bomb police crisis",
    "sport": "match goal coach league season player champion score stadium medal",
    "market": "company shares profit bank price trade investor merger sales dollar",
    "computer": "software internet server virus chip phone browser network file program",
    "science": "planet energy laboratory theory equation experiment atom space telescope cell",
    "health": "doctor diet pain hospital vitamin sleep skin medicine patient symptom",
    "school": "university student teacher degree campus exam college lesson library class",
    "music": "album song guitar band singer concert record melody drummer tune",
    "film": "movie actor scene director script screen comedy sequel camera hero",
    "book": "novel author chapter magazine poem publisher story edition essay reader",
    "art": "painter sculptor gallery portrait museum canvas exhibition designer drawing poet",
    "transport": "ship engine aircraft train submarine vessel locomotive wing deck wheel",
    "building": "tower church bridge roof castle hall brick architect house museum",
    "nature": "river mountain lake valley island glacier forest creek peak volcano",
    "village": "village district province town population county rural region settlement road",
    "animal": "species bird moth beetle fish snail wing habitat shell insect",
    "plant": "flower leaf tree herb seed garden species orchid root shrub",
    "family": "husband mother child marriage friend boyfriend wedding love girl parent",
    "belief": "god church prayer faith culture soul bible tradition heaven holiday",
}
# The themes of each class of a topic task. Several classes share a theme.
_CLASSES = {
    "ag_news": "politics conflict, sport, market politics, computer science market",
    "dbpedia": (
        "market building, school, art music, sport, politics, transport, building, nature, "
        "village nature, animal, plant, music, film, book"
    ),
    "yahoo": (
        "belief family, science, health, school science, computer, sport, market, music film, "
        "family, politics conflict"
    ),
}
_GRADES = (  # from worst to best
    "awful terrible horrible dreadful disgusting rude",
    "bad dull bland slow weak poor",
    "okay average fair decent plain ordinary",
    "good nice pleasant tasty solid enjoyable",
    "excellent amazing superb perfect wonderful brilliant",
)
_ASPECTS = {
    "imdb": "movie story actor scene script director comedy ending music plot dialogue camera",
    "yelp": "food service staff room price burger coffee kitchen waiter menu place dessert",
}
_OPENERS = {
    "imdb": ("i saw this with a friend .", "we rented it last night .", "my first review .", ""),
    "ag_news": ("reuters -", "report :", "update :", "analysis -", "officials said the"),
    "dbpedia": ("it is a", "known for the", "this is one of the", "a former", "the only"),
    "yelp": ("we came here last night .", "first time here .", "i stopped by today .", ""),
    "yahoo": ("what is the", "how do i find a", "can anyone explain the", "is there a"),
}
_ANSWERS = ("i think the", "you should ask about the", "try the", "it depends on the")
_JOINS = ("and the", "of the", "in a", "with some", "but the", "for many", "from the", "near a")
_VERDICTS = ("the {} was {} .", "the {} is {} .", "i found the {} {} .", "a {} that felt {} .")
_NEGATED = ("the {} was not {} .", "i never found the {} {} .", "the {} is hardly {} .")
_NUM_LABELS = {"imdb": 2, "ag_news": 4, "dbpedia": 14, "yelp": 5, "yahoo": 10}
_SORTED = ("imdb", "dbpedia")  # sorted by label, as on the Hub


def embedded_split(task: str, split: str) -> datasets.Dataset:
    """One split of a synthetic task: 2000 training or 500 test rows, the same on every call.

    Args:
        task: "imdb", "ag_news", "dbpedia", "yelp" or "yahoo".
        split: "train" or "test".

    Returns:
        A dataset in memory with the columns of the Hub's dataset. All classes are equally frequent;
        "imdb" and "dbpedia" are sorted by label, as on the Hub.

    Raises:
        ValueError: the task or the split is unknown.
    """
    for name, value, known in (("task", task, _OPENERS), ("split", split, EMBEDDED_ROWS)):
        if value not in known:
            raise ValueError(f"no embedded {name} {value!r}: use one of {', '.join(known)}")
    # A string seeds Random independently of PYTHONHASHSEED.
    rng = random.Random(f"{EMBEDDED_VERSION}/{task}/{split}")
    num_labels = _NUM_LABELS[task]
    labels = [row % num_labels for row in range(EMBEDDED_ROWS[split])]
    if task in _SORTED:
        labels.sort()
    else:
        rng.shuffle(labels)
    return datasets.Dataset.from_list([_row(rng, task, *pair) for pair in enumerate(labels)])


def embedded_vocabulary() -> list[str]:
    """Every word of the synthetic texts, sorted: the vocabulary of a word tokenizer."""
    texts = [*_THEMES.values(), *_GRADES, *_ASPECTS.values(), *_ANSWERS, *_JOINS, ". ?"]
    texts += [opener for openers in _OPENERS.values() for opener in openers]
    texts += [form.replace("{}", "") for form in (*_VERDICTS, *_NEGATED)]
    return sorted(set(" ".join(texts).split()))


def embedded_corpus(count: int) -> list[str]:
    """Texts without labels for language modelling: the same words, but no row of a task.

    Half are opinions of one grade. The others name things of one or two themes, whatever the
    classes of the tasks are.
    """
    rng = random.Random(f"{EMBEDDED_VERSION}/corpus")
    return [_unlabelled(rng) for _ in range(count)]


def _row(rng: random.Random, task: str, number: int, label: int) -> dict[str, str | int]:
    """A row with the Hub's columns."""
    opener = rng.choice(_OPENERS[task])
    if task in _ASPECTS:
        text = f"{opener} {_review(rng, task, label)}".strip()
        return {"text": text, "label": label}
    words = _topic_words(rng, _CLASSES[task].split(", "), label)
    if task == "ag_news":
        return {"text": f"{opener} {_chain(rng, words)} .", "label": label}
    if task == "dbpedia":
        content = f"{opener} {_chain(rng, words[1:])} ."
        return {"label": label, "title": words[0], "content": content}
    return {
        "id": number,
        "topic": label,
        "question_title": f"{opener} {_chain(rng, words[:3])} ?",
        "question_content": "" if rng.random() < 0.4 else f"{_chain(rng, words[3:5])} .",
        "best_answer": f"{rng.choice(_ANSWERS)} {_chain(rng, words[5:])} .",
    }


def _topic_words(rng: random.Random, classes: list[str], label: int) -> list[str]:
    """Eight words: most from the class's themes, some from another class or from any theme."""
    own = [word for theme in classes[label].split() for word in _THEMES[theme].split()]
    other = _THEMES[rng.choice(rng.choice(classes).split())].split()
    anything = _THEMES[rng.choice(list(_THEMES))].split()
    pools = rng.choices((own, other, anything), weights=(13, 4, 3), k=8)
    return [rng.choice(pool) for pool in pools]


def _chain(rng: random.Random, words: list[str]) -> str:
    """The words in order, joined by phrases without meaning."""
    return " ".join([words[0], *(f"{rng.choice(_JOINS)} {word}" for word in words[1:])])


def _review(rng: random.Random, task: str, label: int) -> str:
    """Four verdicts near the label's grade."""
    verdicts = []
    for _ in range(4):
        if task == "imdb":
            liked = label == 1 if rng.random() < 0.9 else label == 0
            grade = rng.choice((3, 4) if liked else (0, 1))
        else:
            grade = _near(rng, label)
        verdicts.append(_verdict(rng, _ASPECTS[task], grade))
    return " ".join(verdicts)


def _near(rng: random.Random, grade: int) -> int:
    """The grade, or in a third of the cases the next one."""
    return min(4, max(0, grade + rng.choice((-1, 0, 0, 0, 0, 1))))


def _verdict(rng: random.Random, aspects: str, grade: int) -> str:
    """A sentence of a grade; a negated one uses a word of the opposite grade."""
    negated = rng.random() < 0.2
    form = rng.choice(_NEGATED if negated else _VERDICTS)
    adjective = rng.choice(_GRADES[4 - grade if negated else grade].split())
    return form.format(rng.choice(aspects.split()), adjective)


def _unlabelled(rng: random.Random) -> str:
    """A text of ``embedded_corpus``."""
    opener = rng.choice(rng.choice(list(_OPENERS.values())))
    if rng.random() < 0.5:
        aspects, grade = rng.choice(list(_ASPECTS.values())), rng.randrange(5)
        verdicts = [_verdict(rng, aspects, _near(rng, grade)) for _ in range(rng.randint(2, 4))]
        return f"{opener} {' '.join(verdicts)}".strip()
    themes = rng.sample(list(_THEMES.values()), rng.randint(1, 2))
    words = rng.choices(" ".join(themes).split(), k=rng.randint(4, 9))
    return f"{opener} {_chain(rng, words)} {rng.choice('.?')}".strip()
