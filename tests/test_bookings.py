"""data/bookings and data/intents: reproducible, well formed, and with nothing to memorise across the splits."""

import re

from helpers import ROOT

from data import make_bookings, regex_baseline

DAYS = {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow"}


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


def test_splits_share_no_phrasing_no_name_and_no_place():
    intents = {split: sum(labels.values(), []) for split, labels in make_bookings.INTENTS.items()}
    for phrasings in (make_bookings.BOOKINGS, intents):
        assert not skeletons(phrasings["train"]) & skeletons(phrasings["validation"])
    names, places, asides = make_bookings.NAMES, make_bookings.PLACES, make_bookings.ASIDES
    assert not words_of(names["train"]) & words_of(names["validation"])  # not even half of a full name
    assert not set(places["train"]) & set(places["validation"])
    assert not set(asides["train"]) & set(asides["validation"])
    everyone = words_of(sum(names.values(), []))
    assert not everyone & words_of(sum(places.values(), []))
    texts = sum(asides.values(), []) + sum(make_bookings.BOOKINGS.values(), [])
    assert not everyone & words_of([re.sub(r"\{\w+\}", "", text) for text in texts])


def test_regular_expressions_do_not_solve_validation():
    train, validation = (regex_baseline.exact_match(ROOT / "data/bookings" / f"{s}.json") for s in make_bookings.SPLITS)
    assert train > 0.7, "the baseline should be an honest one"
    assert validation < 0.6
