"""data/bookings and data/intents: reproducible, well formed, and with nothing to memorise across the splits."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [f"{name}/{split}.json" for name in ("bookings", "intents") for split in ("train", "validation")]
DAYS = {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow"}


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_bookings, regex_baseline = load_script("make_bookings"), load_script("regex_baseline")


def load_rows(name: str, split: str) -> list[dict]:
    return json.loads((ROOT / "data" / name / f"{split}.json").read_text(encoding="utf-8"))


def skeletons(phrasings: list[str]) -> set[str]:
    """Phrasings without slots, punctuation and capitals; those of slots alone keep the order of their slots."""
    words = {re.sub(r"\W+", " ", re.sub(r"\{\w+\}", " ", text)).strip().lower() or text for text in phrasings}
    assert len(words) == len(phrasings), "two phrasings of one split have the same words"
    return words


def words_of(entries: list[str]) -> set[str]:
    return {word.lower() for entry in entries for word in re.findall(r"[\w'-]+", entry)}


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("data")
    make_bookings.main(str(out_dir))
    return out_dir


@pytest.mark.parametrize("file", FILES)
def test_committed_files_are_what_the_script_writes(regenerated, file):
    assert (regenerated / file).read_bytes() == (ROOT / "data" / file).read_bytes()


def test_splits_share_no_phrasing():
    train, validation = (skeletons(make_bookings.BOOKINGS[split]) for split in make_bookings.SPLITS)
    assert not train & validation
    assert len(train) >= 90 and len(validation) >= 24


def test_splits_of_the_intents_share_no_phrasing():
    train, validation = (
        skeletons([text for phrasings in make_bookings.INTENTS[split].values() for text in phrasings])
        for split in make_bookings.SPLITS
    )
    assert not train & validation


def test_splits_share_no_name_and_no_place():
    names, places = make_bookings.NAMES, make_bookings.PLACES
    assert not words_of(names["train"]) & words_of(names["validation"])  # not even half of a full name
    assert not set(places["train"]) & set(places["validation"])
    assert not set(make_bookings.ASIDES["train"]) & set(make_bookings.ASIDES["validation"])
    everyone, everywhere = sum(names.values(), []), sum(places.values(), [])
    assert not words_of(everyone) & words_of(everywhere)
    assert len(set(names["train"])) >= 120 and len(set(places["train"])) >= 90
    assert len(set(names["validation"])) >= 40 and len(set(places["validation"])) >= 30


def test_noise_and_phrasings_hold_no_name_of_the_lists():
    texts = sum(make_bookings.ASIDES.values(), []) + sum(make_bookings.BOOKINGS.values(), [])
    names = words_of(sum(make_bookings.NAMES.values(), []))
    assert not [text for text in texts if names & set(re.findall(r"[\w'-]+", re.sub(r"\{\w+\}", "", text).lower()))]


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
