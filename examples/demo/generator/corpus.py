"""
A grammar that samples sentences in English and German at once.

The sentences need what a translator into German has to know. Gender, case and number agree inside a noun phrase and
with pronouns in the next clause. Verbs stand first, second or last, leave prefixes and participles at the end, and
govern cases and prepositions. Context decides the meaning of a word ("the boy eats", "the dog eats"), and compounds
are one word. Where two synonyms or two positions of an adverb are both right, the grammar samples one of them, so no
translator can reach 100 BLEU. The same seed gives the same corpus on every machine.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import lexicon


HELD_OUT = {"validation": 1000, "test": 1000}  # examples
LONGEST = 16  # words of an English sentence
USUAL = 0.8  # probability of the usual one of several right translations

# One column per case, one key per gender; "p" is any plural.
DEFINITE = {"m": "der den dem", "f": "die die der", "n": "das das dem", "p": "die die den"}
RELATIVE = DEFINITE | {"p": "die die denen"}
PRONOUN = {"m": "er ihn ihm", "f": "sie sie ihr", "n": "es es ihm", "p": "sie sie ihnen"}
STRONG = {"m": "er en em", "f": "e e er", "n": "es es em", "p": "e e en"}  # dieser, jeder; adjectives on their own
EIN = {"m": "- en em", "f": "e e er", "n": "- - em", "p": "e e en"}  # ein, kein, mein, ...
WEAK = {"m": "e en en", "f": "e e en", "n": "e e en", "p": "en en en"}  # adjectives after der, dieser, ...
MIXED = {"m": "er en en", "f": "e e en", "n": "es es en", "p": "en en en"}  # adjectives after ein, kein, ...
CONTRACTIONS = {"in dem": "im", "in das": "ins", "an dem": "am", "an das": "ans"}
STEMS = {"teuer": "teur", "hoch": "hoh"}  # before an ending

# english singular, english plural ("-": none), german stem, endings of the adjectives that follow, weight
DETERMINERS: list[tuple[str, str, str, dict[str, str], int]] = [
    ("the", "the", "d", WEAK, 12),
    ("a", "-", "ein", MIXED, 7),
    ("this", "these", "dies", WEAK, 2),
    ("every", "-", "jed", WEAK, 1),
    ("my", "my", "mein", MIXED, 2),
    ("his", "his", "sein", MIXED, 2),
    ("her", "her", "ihr", MIXED, 2),
    ("our", "our", "unser", MIXED, 1),
    ("no", "no", "kein", MIXED, 1),
    ("-", "two", "zwei", STRONG, 2),
    ("-", "three", "drei", STRONG, 1),
    ("-", "many", "viel", STRONG, 1),
    ("-", "some", "einig", STRONG, 1),
]
EIN_WORDS = {"ein", "mein", "sein", "ihr", "unser", "kein"}
# english subject, english object, german by case, gender
PERSONS = "I me ich mich mir m|we us wir uns uns p|he him er ihn ihm m|she her sie sie ihr f|they them sie sie ihnen p"
# english | german alternatives; an empty one depends on the tense
SUBORDINATORS = [
    ["because", "weil ; da"],
    ["although", "obwohl"],
    ["when", ""],
    ["if", "wenn ; falls"],
    ["while", "während"],
]
TENSES = {"present": 40, "progressive": 8, "past": 25, "perfect": 12, "modal": 15}


@dataclass
class Phrase:
    """
    A noun phrase or a pronoun.

    Args:
        english: Its English words.
        german: Its German words in the nominative, accusative and dative.
        gender: `"m"`, `"f"`, `"n"`, or `"p"` for any plural.
        classes: The semantic classes that verbs and adjectives select by.
        again: The English pronoun that refers to it in a later clause.
        english_object: Its English form as an object, if that is different.
    """

    english: str
    german: list[str]
    gender: str
    classes: set[str]
    again: str = "it"
    english_object: str = ""

    @property
    def is_pronoun(self) -> bool:
        return bool(self.english_object)


@dataclass
class Clause:
    """A clause whose German parts have no order yet: the kind of the clause decides where its verb stands."""

    subject: Phrase
    tense: str
    auxiliary: str = ""  # English; a question starts with it
    verb: str = ""  # English
    finite: str = ""  # German, as all below; pairs are (English, German)
    end: str = ""  # participle or infinitive
    prefix: str = ""  # prefix of a separable verb
    pronouns: list[tuple[str, str]] = field(default_factory=list)
    objects: list[tuple[str, str]] = field(default_factory=list)
    others: list[tuple[str, str]] = field(default_factory=list)
    negation: tuple[str, str] = ("", "")
    time: tuple[str, str] = ("", "")
    complement: tuple[str, str] = ("", "")  # a clause with "that", which comes last
    mentioned: Phrase | None = None  # the phrase that a pronoun of the next clause refers to

    def english(self, question: bool = False) -> str:
        subject, rest = (
            self.subject.english,
            [self.pronouns, self.objects, self.others, [self.time], [self.complement]],
        )
        verb = [self.auxiliary, subject] if question else [subject, self.auxiliary]
        return join(*verb, self.negation[0], self.verb, *(words for part in rest for words, _ in part))

    def german(self, order: str = "second", front: str = "") -> str:
        """
        Return the German clause.

        Args:
            order: Position of the finite verb: `"first"` in questions and after a dependent clause, `"second"`, or
                `"last"`.
            front: Words that come first; with order `"second"` they replace the subject there.
        """
        parts = [self.pronouns, [self.time], self.objects, [self.negation], self.others]
        middle = [words for part in parts for _, words in part]
        subject, end = self.subject.german[0], self.end or self.prefix
        if order == "last":
            finite = self.finite if self.end else self.prefix + self.finite
            return join(front, subject, *middle, self.end, finite, self.complement[1])
        head = [subject, self.finite] if order == "second" and not front else [front, self.finite, subject]
        return join(*head, *middle, end, self.complement[1])


def join(*words: str) -> str:
    return " ".join(word for word in words if word)


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


class Grammar:
    """
    Samples sentences in both languages.

    Args:
        seed: Seed of all sampling.
    """

    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)
        self.nouns = table(lexicon.NOUNS)
        self.masses = table(lexicon.MASSES)
        self.places = table(lexicon.PLACES)
        self.relations = table(lexicon.RELATIONS)
        self.adjectives = table(lexicon.ADJECTIVES)
        for english, readings in table(lexicon.ADJECTIVES_BY_CLASS):
            self.adjectives += [[english, *reading.split()] for reading in readings.split(";")]
        self.verbs = table(lexicon.VERBS)
        self.modals = table(lexicon.MODALS)
        self.times = table(lexicon.TIMES)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def frequent(self, entries: Sequence[Any]) -> Any:
        """Sample one of the entries; earlier ones are more frequent."""
        return self.random.choices(entries, [1 / (rank + 8) for rank in range(len(entries))])[0]

    def either(self, alternatives: str) -> str:
        """Sample one of the translations between semicolons; the first is the usual one."""
        first, *others = (alternative.strip() for alternative in alternatives.split(";"))
        return first if not others or self.chance(USUAL) else self.random.choice(others)

    # Noun phrases

    def phrase(self, classes: str = "*", simple: bool = False) -> Phrase:
        """Sample a noun phrase of one of the classes (`"*"`: any); a simple one has no relative clause."""
        wanted = set(classes.split())
        if "person" in wanted and self.chance(0.22):
            return self.person()
        masses = [mass for mass in self.masses if wanted & set(mass[2].split())]
        nouns = [noun for noun in self.nouns if "*" in wanted or wanted & set(noun[2].split())]
        if masses and (not nouns or self.chance(0.4)):
            english, german, kinds = self.frequent(masses)
            word, gender = german.split()
            return self.agreeing(english, [word] * 3, gender, set(kinds.split()), None)
        phrase = self.noun(nouns)
        if not simple and self.chance(0.12):
            self.add_relative_clause(phrase)
        return phrase

    def person(self) -> Phrase:
        """Sample a name or a personal pronoun."""
        if self.chance(0.5):
            name, gender = self.random.choice(lexicon.NAMES.split("|")).split()
            return Phrase(name, [name] * 3, gender, {"person"}, "he" if gender == "m" else "she")
        english, english_object, *german, gender = self.random.choice(PERSONS.split("|")).split()
        return Phrase(english, german, gender, {"person"}, english, english_object)

    def noun(self, nouns: list[list[str]]) -> Phrase:
        """Sample a noun with determiner and adjectives, singular or plural, sometimes as the head of a compound."""
        english, german, kinds = self.frequent(nouns)
        names, (word, gender, words), classes = english.split(), self.either(german).split(), set(kinds.split())
        again = "she" if names[0] == "girl" else {"m": "he", "f": "she", "n": "it"}[gender[0]]
        if names[0] in lexicon.COMPOUND_HEADS and self.chance(0.5):
            part, stem = self.frequent(list(lexicon.COMPOUND_PARTS.items()))
            names, word, words = [f"{part} {name}" for name in names], stem + word.lower(), stem + words.lower()
        if self.chance(0.3):
            forms = [words, words, words if words[-1] in "ns" else words + "n"]
            return self.agreeing(names[1], forms, "p", classes, self.determiner(1), "they")
        forms = [word, words, words] if gender == "mw" else [word] * 3
        return self.agreeing(
            names[0], forms, gender[0], classes, self.determiner(0), again if "person" in classes else "it"
        )

    def determiner(self, column: int) -> tuple:
        return self.random.choices(DETERMINERS, [0 if row[column] == "-" else row[4] for row in DETERMINERS])[0]

    def agreeing(
        self,
        english: str,
        forms: list[str],
        gender: str,
        classes: set[str],
        determiner: tuple | None,
        again: str = "it",
    ) -> Phrase:
        """Combine determiner, adjectives and noun, which agree in German by gender, number and case."""
        endings = determiner[3] if determiner else STRONG
        adjectives = [
            self.adjective(classes, general=determiner is not None)
            for _ in range(self.random.choices((0, 1, 2), (60, 35, 5))[0])
        ]
        adjectives = list(dict(adjectives).items())
        words = [*dict(adjectives), english]
        if determiner:
            article = determiner[1 if gender == "p" else 0]
            words.insert(0, "an" if article == "a" and words[0][0] in "aeiou" else article)
        german = []
        for case, form in enumerate(forms):
            ending = endings[gender].split()[case]
            inflected = [STEMS.get(adjective, adjective).removesuffix("e") + ending for _, adjective in adjectives]
            german.append(join(self.article(determiner[2], gender, case) if determiner else "", *inflected, form))
        return Phrase(join(*words), german, gender, classes, again)

    def article(self, stem: str, gender: str, case: int) -> str:
        if stem in ("zwei", "drei"):
            return stem
        if stem == "d":
            return DEFINITE[gender].split()[case]
        return stem + (EIN if stem in EIN_WORDS else STRONG)[gender].split()[case].strip("-")

    def adjective(self, classes: set[str], general: bool = True) -> tuple[str, str]:
        """Sample an adjective for a noun of these classes, with its German; `general` allows those for any noun."""
        fitting = [
            entry for entry in self.adjectives if classes & set(entry[2].split()) or (general and entry[2] == "*")
        ]
        english = self.frequent(fitting)[0]
        return english, self.either(next(entry[1] for entry in fitting if entry[0] == english))

    def add_relative_clause(self, head: Phrase) -> None:
        """Add a relative clause in which the pronoun is the subject or the object."""
        is_person = "person" in head.classes
        pronoun = Phrase("who" if is_person else "that", RELATIVE[head.gender].split(), head.gender, head.classes)
        if self.chance(0.55) and head.classes & {"person", "animal"}:
            clause = self.clause(subject=pronoun)
            english, german = clause.english(), clause.german("last")
        else:
            verbs = [verb for verb in self.verbs if verb[2] in ("acc", "dat") and self.takes(verb[4], head.classes)]
            verb = self.frequent(verbs)
            clause = self.clause(verb=verb, gap=True)
            english = join("whom" if is_person else "that", clause.english())
            german = clause.german("last", pronoun.german[1 if verb[2] == "acc" else 2])
        head.english = join(head.english, english)
        head.german = [f"{words}, {german}," for words in head.german]

    # Clauses

    @staticmethod
    def takes(wanted: str, classes: set[str]) -> bool:
        return wanted == "*" or bool(classes & set(wanted.split()))

    def clause(self, subject: Phrase | None = None, verb: list[str] | None = None, gap: bool = False) -> Clause:
        """Sample a clause, maybe with a relative pronoun as its `subject` or a `gap` in place of its object."""
        inside = gap or subject is not None
        if verb is None:
            verbs = [entry for entry in self.verbs if not (inside and entry[2] == "that")]
            verb = self.frequent(
                [entry for entry in verbs if subject is None or self.takes(entry[3], subject.classes)]
            )
        clause = Clause(
            subject or self.phrase(verb[3], simple=gap), self.random.choices(list(TENSES), list(TENSES.values()))[0]
        )
        self.inflect(clause, verb)
        if not gap:
            self.complete(clause, verb, inside)
        if not inside and self.chance(0.3):
            english, german = self.frequent(self.times)
            clause.time = (english, self.either(german))
        return clause

    def inflect(self, clause: Clause, verb: list[str]) -> None:
        """Fill in the verb in both languages; it agrees with the subject."""
        base, third, past, participle, ing = (form.replace("_", " ") for form in verb[0].split())
        infinitive, present, imperfect, perfect, auxiliary = self.either(verb[1]).split()
        clause.prefix, infinitive = infinitive.split("+") if "+" in infinitive else ("", infinitive)
        if clause.tense == "progressive" and ing == "-":
            clause.tense = "present"
        plural, first = clause.subject.gender == "p", clause.subject.english == "I"
        many = plural or first
        negated = clause.tense != "modal" and self.chance(0.08)
        if negated:
            clause.negation = ("not", "nicht")
        ich = present if present == "weiß" else infinitive.removesuffix("n").removesuffix("e") + "e"
        if clause.tense in ("present", "progressive"):
            clause.finite = infinitive if plural else ich if first else present
            clause.verb = base if many else third
            if clause.tense == "progressive":
                clause.auxiliary, clause.verb = "am" if first else "are" if plural else "is", ing
            elif negated:
                clause.auxiliary, clause.verb = "do" if many else "does", base
        elif clause.tense == "past":
            clause.finite = (imperfect + ("n" if imperfect[-1] == "e" else "en")) if plural else imperfect
            clause.auxiliary, clause.verb = ("did", base) if negated else ("", past)
        elif clause.tense == "perfect":
            clause.finite = {"h": "hat habe haben", "s": "ist bin sind"}[auxiliary].split()[
                2 if plural else int(first)
            ]
            clause.auxiliary, clause.verb, clause.end = "have" if many else "has", participle, clause.prefix + perfect
        else:
            english, german = self.frequent(self.modals)
            clause.auxiliary = english.split()[1 if many and len(english.split()) > 1 else 0].replace("_", " ")
            one, all_ = german.split()
            clause.finite = all_ if plural else "werde" if first and one == "wird" else one
            clause.verb, clause.end = base, clause.prefix + infinitive

    def complete(self, clause: Clause, verb: list[str], inside: bool) -> None:
        """Add the complements of the verb: objects in their cases, prepositions, places, a clause with "that"."""
        frame = verb[2].split()
        if frame == ["that"]:
            clause.complement = self.that_clause()
        elif frame[-1] in ("place", "whither") and (frame[0] == "acc" or self.chance(0.85)):
            clause.others.append(self.place(1 if frame[-1] == "whither" else 2, bare=frame[0] == "acc"))
        if frame[0] == "dat" and len(frame) == 2:
            self.add_object(clause, self.phrase("person", simple=True), 2)
        if frame[0] in ("acc", "dat"):
            thing = self.phrase(verb[4], simple=inside or bool(clause.others))
            if len(frame) == 2 and thing.is_pronoun:
                thing = self.noun([noun for noun in self.nouns if self.takes(verb[4], set(noun[2].split()))])
            self.add_object(clause, thing, 1 if frame[-1] != "dat" else 2)
        elif len(frame) == 2:
            thing = self.phrase(verb[4], simple=inside)
            german = thing.german[1 if frame[1] == "acc" else 2]
            clause.others.append((thing.english_object or thing.english, f"{frame[0]} {german}"))
            clause.mentioned = thing

    def add_object(self, clause: Clause, phrase: Phrase, case: int) -> None:
        if phrase.english == clause.subject.english and phrase.is_pronoun:  # "he sees him", but not "I see me"
            phrase = self.noun([noun for noun in self.nouns if "person" in noun[2]])
        words = (phrase.english_object or phrase.english, phrase.german[case])
        (clause.pronouns if phrase.is_pronoun else clause.objects).append(words)
        clause.mentioned = None if phrase.is_pronoun else phrase

    def place(self, case: int, bare: bool) -> tuple[str, str]:
        """Sample a location (dative) or direction (accusative): a fixed phrase, or a preposition with a thing."""
        if bare or self.chance(0.3):
            english, german = self.frequent(self.relations)
            thing = self.noun(
                [noun for noun in self.nouns if self.takes("furniture building outdoor", set(noun[2].split()))]
            )
            return f"{english} {thing.english}", f"{german} {thing.german[case]}"
        english, german = self.frequent(self.places)
        preposition, noun, gender = german.split()
        noun += "n" if gender == "p" and case == 2 else ""
        head = f"{preposition} {DEFINITE[gender].split()[case]}"
        return english.split(", ")[2 - case], f"{CONTRACTIONS.get(head, head)} {noun}"

    def that_clause(self) -> tuple[str, str]:
        verbs = [verb for verb in self.verbs if verb[2] != "that"]
        clause = self.clause(verb=self.frequent(verbs)) if self.chance(0.7) else self.copula()
        return f"that {clause.english()}", f", dass {clause.german('last')}"

    def copula(self, subject: Phrase | None = None, classes: set[str] | None = None) -> Clause:
        """Sample a clause of subject, "to be" and adjective."""
        subject = subject or self.phrase()
        clause = Clause(subject, self.random.choices(("present", "past"), (70, 30))[0])
        plural, first, past = subject.gender == "p", subject.english == "I", clause.tense == "past"
        clause.auxiliary = ("were" if plural else "was") if past else "are" if plural else "am" if first else "is"
        clause.finite = ("waren" if plural else "war") if past else "sind" if plural else "bin" if first else "ist"
        clause.negation = ("not", "nicht") if self.chance(0.15) else ("", "")
        clause.others = [self.adjective(classes or subject.classes)]
        return clause

    # Sentences

    def sentence(self) -> tuple[str, str]:
        """Sample a sentence in English and in German."""
        kinds = {"plain": 46, "question": 7, "copula": 8, "two": 10, "subordinate": 15, "again": 14}
        kind = self.random.choices(list(kinds), list(kinds.values()))[0]
        english, german = getattr(self, f"_{kind}")()
        return self.finish(english), self.finish(german)

    @staticmethod
    def finish(text: str) -> str:
        """Capitalize and punctuate a sentence, and remove doubled commas."""
        text = text if text.endswith("?") else text + "."
        for wrong, right in ((" ,", ","), (",,", ","), (",.", "."), (",?", "?")):
            text = text.replace(wrong, right)
        return text[0].upper() + text[1:]

    def fronted(self, clause: Clause) -> tuple[str, str]:
        """Return the clause as a main clause, with its adverb of time at the front or inside."""
        english, german = clause.time
        if not english:
            return clause.english(), clause.german()
        if self.chance(0.35):
            clause.time = ("", "")
            return f"{english} {clause.english()}", clause.german(front=german)
        text = clause.english()
        if self.chance(USUAL):
            return text, clause.german()
        clause.time = ("", "")
        return text, clause.german(front=german)

    def _plain(self) -> tuple[str, str]:
        return self.fronted(self.clause())

    def _question(self) -> tuple[str, str]:
        clause = self.clause(verb=self.frequent([verb for verb in self.verbs if verb[2] != "that"]))
        if not clause.auxiliary:
            past, many = clause.tense == "past", clause.subject.gender == "p" or clause.subject.english == "I"
            clause.auxiliary = "did" if past else "do" if many else "does"
            clause.verb = next(
                v[0].split()[0] for v in self.verbs if clause.verb.replace(" ", "_") in v[0].split()
            ).replace("_", " ")
        if clause.auxiliary.startswith("want"):
            clause.auxiliary, clause.verb = (
                "does" if clause.auxiliary == "wants to" else "do",
                f"want to {clause.verb}",
            )
        return clause.english(question=True) + "?", clause.german("first") + "?"

    def _copula(self) -> tuple[str, str]:
        clause = self.copula()
        return clause.english(), clause.german()

    def _two(self) -> tuple[str, str]:
        english, german = self.random.choice((("and", "und"), ("but", ", aber")))
        first, second = self.fronted(self.clause()), self.clause()
        return join(first[0], english, second.english()), join(first[1], german, second.german())

    def _subordinate(self) -> tuple[str, str]:
        english, german = self.frequent(SUBORDINATORS)
        main, sub = self.clause(), self.clause(verb=self.frequent([verb for verb in self.verbs if verb[2] != "that"]))
        german = self.either(german) or ("als" if sub.tense in ("past", "perfect") else "wenn")
        dependent = (f"{english} {sub.english()}", f"{german} {sub.german('last')}")
        if self.chance(0.3):
            return f"{dependent[0]}, {main.english()}", f"{dependent[1]}, {main.german('first')}"
        return join(main.english(), dependent[0]), f"{main.german()}, {dependent[1]}"

    def _again(self) -> tuple[str, str]:
        """Sample two clauses; a pronoun in the second refers to the last noun of the first."""
        clause = self.clause()
        noun = clause.mentioned
        if noun is None:
            return self.fronted(clause)
        pronoun = Phrase(noun.again, PRONOUN[noun.gender].split(), noun.gender, noun.classes)
        follower = self.copula(pronoun)
        english, german, order = self.random.choice(
            (("because", ", weil", "last"), ("but", ", aber", "second"), ("although", ", obwohl", "last"))
        )
        return join(clause.english(), english, follower.english()), join(
            clause.german(), german, follower.german(order)
        )


def sample_examples(count: int, seed: int = 0) -> list[dict[str, str]]:
    """
    Sample examples with different English sentences.

    Args:
        count: Number of examples.
        seed: Seed; a larger `count` with the same seed starts with the same examples.

    Returns:
        Rows with `prompt` (English) and `target` (German).
    """
    grammar = Grammar(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        english, german = grammar.sentence()
        if len(english.split()) <= LONGEST:
            found.setdefault(english, german)
    return [{"prompt": english, "target": german} for english, german in found.items()]


def splits(train: int, seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """
    Sample the corpus. No English sentence is in two splits.

    Args:
        train: Number of training examples; a larger training split starts with the examples of a smaller one.
        seed: See [`sample_examples`].
    """
    examples, result = sample_examples(sum(HELD_OUT.values()) + train, seed), {}
    for name, size in (HELD_OUT | {"train": train}).items():
        result[name], examples = examples[:size], examples[size:]
    return result


def in_batches(examples: Sequence[dict[str, str]], size: int, seed: int = 0) -> list[dict[str, str]]:
    """
    Order examples so that each batch holds targets of similar length and the batches are shuffled.

    Training in this order halves the time, because batches need little padding. The file then needs
    `train_sampling_strategy: sequential`.

    Args:
        examples: Examples in random order.
        size: Examples per batch.
        seed: Seed of the order of the batches.
    """
    batches = []
    for start in range(0, len(examples), 50 * size):
        near = sorted(examples[start : start + 50 * size], key=lambda example: len(example["target"]))
        batches += [near[first : first + size] for first in range(0, len(near), size)]
    random.Random(seed).shuffle(batches)
    return [example for batch in batches for example in batch]
