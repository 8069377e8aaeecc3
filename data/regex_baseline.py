"""Solve data/bookings with hand-written regular expressions: what a finetuned model has to beat.

    python data/regex_baseline.py --data data/bookings/validation.json

The patterns come from reading the training messages; validation was only scored. Each field is found in turn and cut
out of the message, so that no later field reads it again.
"""

import json
import re
from pathlib import Path

from lit_llama import cli

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NUMBER = rf"\b(\d\d?|{'|'.join(NUMBERS)})\b"

# Sentences about an earlier visit or someone else, other people and towns, greetings, thanks.
ASIDE = r"\b(l\w{1,2}t t\w{2,3}|came|23:00|was for 8|neighbour|told me(?=\.)|one of us|s\w+p is|than|is kind)\b"
NOISE = [rf"(?i)[^.?!]*{ASIDE}[^.?!]*[.?!]?", r"\bf\w+ the [A-Z]\w+ [A-Z]\w+|\bin Porto",
         r"(?i)^\s*(hi|hello|hey \w{5}|good day|hi \w{4}|dear all)[!.]",
         r"(?i)(\b(many|much) )?\b(thanks|thank you|thx|app?r?\w+ed)[.!]?\s*$"]

DAY = rf"(?i)\b(?:on |this )*({'|'.join(DAYS)}|mon|tue|wed|thu|fri|sat|sun)\b(?: evening)?"
TIME = r"\b(?P<hour>\d\d?)(?:[:.h]?(?P<minute>\d\d)h?|h)(?!\d)"
GUESTS = [r"(?i)\b(just me)\b", rf"(?i){NUMBER} (?:people|person|guests|ppl|of us|seats|chairs|covers)\b",
          rf"(?i)\b(?:party|group|table|we are|we'll be) (?:of |for )?{NUMBER}",
          rf"(?i)\b(?:guests|count|size): {NUMBER}", rf"(?i)\bfor {NUMBER}", rf"(?i){NUMBER}"]

# Words that have a capital only because a sentence starts there; a misspelled one goes the same way.
STARTS = """a any anything at book can could count dinner do does for friend good guest hold hopefully hoping if is it
its kindly let looking lunch make may my need ok our pencil please put request reservation reserve restaurant save
say size spot squeeze table tell thinking there this to under we when where who would arrival after name""".split()

# Capitalised words, with the small words that stand inside the names of places.
TITLE = r"([A-ZÀ-Þ][\w'-]+(?: (?:(?:and|du|de|la) )?[A-ZÀ-Þ][\w'-]+)*)"
NAME_CUES = [
    rf"(?i:reservation:|\bseats for|^save \| for|\bbook\w* for|\bsp?o?p?t for) {TITLE}", rf"^{TITLE}(?=, \|)",
    rf"(?i:\bna?m?e?(?:'s| is|:|,)?|\bthis is|\bi'm|\bi am|\bunder|\bcall me|\bsign us up as|\bmy name,) {TITLE}",
    rf"(?i:\b(?:book|say|hold) it(?:'s)? (?:as|for)|\bput|\bask(?: for)?|\bis for|\bwho:|\bpencil in|\bas) {TITLE}",
    rf"(?i:\bregards,|\bcheers,|\bthanks,|\bthx,|\byours,|\bsigned,|\bcrossed,|\bits|\bit's) {TITLE}",
    rf"{TITLE}(?i: here\b| again\b| speaking\b| would\b| seeks\b| needs\b| wants\b| is the name\b)",
    rf"[(-] ?{TITLE}\)?$", rf"[.?!|,] {TITLE}\W*$", rf"^{TITLE}[,:]"]
PLACE_CUES = [
    rf"(?i:\bat|\bto|\binto|\bin|\bwith|\btry|\bwhere:|\brestaurant:|\bplace[:,]|\babout|\bvisit|\bbook) {TITLE}",
    rf"(?i:\bcould|\bis|\bdoes|\bif|\bchose|\bfancy|\bpicks|\bof|\bmake it|\bneed|\bdo|\bfor|\bwants|\btable:) {TITLE}",
    rf"(?:[|,.:] |^){TITLE}", TITLE]


def lower_starts(text: str) -> str:
    """Write common words at the start of a sentence small, so that a capital means a name or a place."""
    def lower(match: re.Match) -> str:
        word = match[2].lower()
        near = len(word) > 3 and any(sorted(word) == sorted(start) for start in STARTS)
        return match[1] + (word if near or word in STARTS else match[2])
    return re.sub(r"(^|[.?!:] )([A-Z]\w*)", lower, text)


def cut(patterns: list[str], text: str) -> tuple[re.Match | None, str]:
    """The match of the first pattern that has one, and the text with a bar in its place."""
    for pattern in patterns:
        if match := re.search(pattern, text):
            return match, f"{text[:match.start()]}|{text[match.end():]}"
    return None, text


def to_number(text: str) -> int:
    return 1 if text.lower() == "just me" else NUMBERS.index(text.lower()) + 1 if text.isalpha() else int(text)


def read_booking(message: str) -> dict:
    text = message
    for noise in NOISE:
        text = re.sub(noise, "", text).strip()
    day, text = cut([DAY], lower_starts(text))
    time, text = cut([TIME], text)
    guests, text = cut(GUESTS, text)
    name, text = cut(NAME_CUES, text)
    place, text = cut(PLACE_CUES, text)
    return {"name": name[1] if name else (re.findall(TITLE, text) or [""])[-1], "place": place[1] if place else "",
            "day": next(full for full in DAYS if full.lower().startswith(day[1].lower())) if day else "",
            "time": f"{time['hour']}:{time['minute'] or '00'}" if time else "",
            "guests": to_number(guests[1]) if guests else 1}


def exact_match(data: str | Path) -> float:
    """The fraction of rows that are right in all five fields."""
    rows = json.loads(Path(data).read_text(encoding="utf-8"))
    return sum(read_booking(row["instruction"]) == json.loads(row["output"]) for row in rows) / len(rows)


def main(data: str = "data/bookings/validation.json") -> None:
    """Print the exact match.

    Args:
        data: A file of bookings in the Alpaca form.
    """
    print(f"{data}: {100 * exact_match(data):.1f} % exact match")


if __name__ == "__main__":
    cli.run(main)
