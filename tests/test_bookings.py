"""data/bookings and data/intents: reproducible, well formed, and with nothing to memorise across the splits."""

import json
import re
from collections import Counter

import pytest
from helpers import ROOT

from data import make_bookings, regex_baseline

DAYS = {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow"}


def load_rows(name: str, split: str) -> list[dict]:
    return json.loads((ROOT / "data" / name / f"{split}.json").read_text(encoding="utf-8"))


def skeletons(phrasings: list[str]) -> set[str]:
    """Phrasings without slots, punctuation and capitals; those of slots alone keep the order of their slots."""
    words = {re.sub(r"\W+", " ", re.sub(r"\{\w+\}", " ", text)).strip().lower() or text for text in phrasings}
    assert len(words) == len(phrasings), "two phrasings of one split have the same words"
    return words


def words_of(entries: list[str]) -> set[str]:
    return {word.lower() for entry in entries for word in re.findall(r"[\w'-]+", entry)}


def test_committed_files_are_what_the_script_writes(tmp_path):
    make_bookings.main(str(tmp_path))
    written = [file.relative_to(tmp_path) for file in tmp_path.rglob("*.json")]
    assert len(written) == 4
    for file in written:
        assert (tmp_path / file).read_bytes() == (ROOT / "data" / file).read_bytes(), file


def test_splits_share_no_phrasing():
    intents = {split: sum(labels.values(), []) for split, labels in make_bookings.INTENTS.items()}
    for phrasings in (make_bookings.BOOKINGS, intents):
        assert not skeletons(phrasings["train"]) & skeletons(phrasings["validation"])
    assert len(make_bookings.BOOKINGS["train"]) >= 90 and len(make_bookings.BOOKINGS["validation"]) >= 24


def test_splits_share_no_name_and_no_place():
    names, places, asides = make_bookings.NAMES, make_bookings.PLACES, make_bookings.ASIDES
    assert not words_of(names["train"]) & words_of(names["validation"])  # not even half of a full name
    assert not set(places["train"]) & set(places["validation"])
    assert not set(asides["train"]) & set(asides["validation"])
    assert len(set(names["train"])) >= 120 and len(set(places["train"])) >= 90
    assert len(set(names["validation"])) >= 40 and len(set(places["validation"])) >= 30
    everyone = words_of(sum(names.values(), []))
    assert not everyone & words_of(sum(places.values(), []))
    texts = sum(asides.values(), []) + sum(make_bookings.BOOKINGS.values(), [])
    assert not everyone & words_of([re.sub(r"\{\w+\}", "", text) for text in texts])


@pytest.mark.parametrize("split, count", [("train", 1800), ("validation", 200)])
def test_bookings_are_well_formed(split, count):
    rows = load_rows("bookings", split)
    assert len(rows) == count
    for row in rows:
        booking = json.loads(row["output"])
        assert list(row) == ["instruction", "output"]
        assert row["output"] == json.dumps(booking, ensure_ascii=False, separators=(",", ":"))
        assert list(booking) == ["name", "place", "day", "time", "guests"]
        assert re.fullmatch(r"(1[2-4]|1[7-9]|2[01]):(00|15|30|45)", booking["time"])
        assert type(booking["guests"]) is int and 1 <= booking["guests"] <= 12
        assert booking["day"] in DAYS
        assert booking["name"] in row["instruction"] and booking["place"] in row["instruction"]
        assert (booking["name"] in make_bookings.NAMES["validation"]) is (split == "validation")
        assert (booking["place"] in make_bookings.PLACES["validation"]) is (split == "validation")
        assert len(row["instruction"]) <= 200 and "{" not in row["instruction"]


@pytest.mark.parametrize("name, field", [("bookings", "instruction"), ("intents", "text")])
def test_no_message_occurs_twice(name, field):
    messages = Counter(row[field] for split in make_bookings.SPLITS for row in load_rows(name, split))
    assert [text for text, count in messages.items() if count > 1] == []


def test_no_intent_is_given_away_by_its_own_word():
    """Each of the words "book", "change" and "cancel" also occurs under other labels, and not under all of its own."""
    rows = load_rows("intents", "train")
    for word in ("book", "change", "cancel"):
        labels = Counter(row["label"] for row in rows if word in row["text"].lower())
        assert len(labels) >= 3 and labels[word] < 150


def test_regular_expressions_do_not_solve_validation():
    train, validation = (regex_baseline.exact_match(ROOT / "data/bookings" / f"{s}.json") for s in make_bookings.SPLITS)
    assert train > 0.7, "the baseline should be an honest one"
    assert validation < 0.6
