"""Make the two small data sets of this project, data/bookings and data/intents.

    python data/make_bookings.py

A message is a phrasing with slots, plus noise. The splits share how times, days and numbers are written, but no
phrasing, no name and no place: a model that memorises sentences fails the validation split.

Slots: {name} {place}; {day} "Friday", {on} "on Friday"; {time}; {n} "six"; {people} "six people"; {we} "we are six".
"""

import json
import random
import re
from pathlib import Path

from lit_llama import cli
from lit_llama.data.prepare import write_rows

SPLITS = ("train", "validation")
BOOKING_ROWS = {"train": 1800, "validation": 200}
INTENT_ROWS = {"train": 800, "validation": 200}

# How often each way to write a time is used, in percent.
TIME_FORMS = {"19:30": 55, "19.30": 15, "19h30": 15, "1930h": 15}
DAY_FORMS = {"Friday": 40, "Fri": 18, "friday": 12, "this Friday": 15, "Friday evening": 15}
NOISE = {"greeting": 0.2, "aside": 0.1, "thanks": 0.12, "typo": 0.15, "lower case": 0.1, "no full stop": 0.15}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow"]
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
TIMES = [(hour, minute) for hour in (12, 13, 14, 17, 18, 19, 20, 21) for minute in (0, 15, 30, 45)]
GUEST_WEIGHTS = {1: 5, 2: 10, 3: 9, 4: 11, 5: 10, 6: 11, 7: 9, 8: 9, 9: 7, 10: 7, 11: 6, 12: 6}
PEOPLE = ["{} people", "{} people", "{} guests", "a party of {}", "a group of {}", "{} of us", "{} ppl"]
WE = ["there will be {} of us", "there are {} of us", "we are {}", "we'll be {}", "we will be {} people", "it's for {}"]
GREETINGS = ["Hi!", "Hello!", "Hey there!", "Good day.", "Hi team!", "Dear all."]
THANKS = ["Thanks!", "Thank you.", "Many thanks.", "Thx!", "Much appreciated."]

# With these words in a message one guest would read oddly ("1 seats", "we are one").
PLURAL = re.compile(r"(?i)(?<!{)\b(we|us|our|seats|chairs|covers|heads|ppl|people|friends|club|company|group|mouths)\b")

HERE = Path(__file__).parent
WORDS = json.loads((HERE / "words.json").read_text(encoding="utf-8"))
PHRASINGS = json.loads((HERE / "phrasings.json").read_text(encoding="utf-8"))
NAMES, PLACES = WORDS["names"], WORDS["places"]
ASIDES = PHRASINGS["asides"]  # a reader sees that the days, numbers and names in these are not the booking's
BOOKINGS = PHRASINGS["bookings"]  # one that says dinner or lunch is only given such hours (see draw_booking)
MIXED = PHRASINGS["mixed"]  # sentences for the place and the time, for the guests, for the name
INTENTS = PHRASINGS["intents"]


def choose(rng: random.Random, weights: dict) -> object:
    return rng.choices(list(weights), list(weights.values()))[0]


def write_time(form: str, hour: int, minute: int) -> str:
    if form == "19h30" and minute == 0:
        return f"{hour}h"
    return form.replace("19", str(hour)).replace("30", f"{minute:02d}")


def write_day(rng: random.Random, day: str, hour: int) -> str:
    form = choose(rng, DAY_FORMS)
    if day in ("today", "tomorrow") or (form == "Friday evening" and hour < 17):
        return day
    return {"Fri": day[:3], "friday": day.lower()}.get(form) or form.replace("Friday", day)


def write_guests(rng: random.Random, guests: int) -> dict[str, str]:
    n = str(guests) if rng.random() < 0.65 else NUMBERS[guests]
    if guests == 1:
        return {"n": n, "people": rng.choice(["just me", f"{n} person"]), "we": "it is just me"}
    return {"n": n, "people": rng.choice(PEOPLE).format(n), "we": rng.choice(WE).format(n)}


def draw_name(rng: random.Random, split: str) -> str:
    """A name from the list. In training, half of the names are made up, so that the model learns to copy names."""
    if split == "validation":
        return rng.choice(NAMES[split])
    parts = WORDS["more_names"]
    known, made = rng.choice(NAMES[split]), rng.choice(parts["openings"]) + rng.choice(parts["closings"])
    name = known if rng.random() < 0.5 else made
    return f"{name} {rng.choice(WORDS['more_surnames'])}" if " " not in name and rng.random() < 0.35 else name


def draw_place(rng: random.Random, split: str) -> str:
    """A place from the list. In training, more than half of the places are made up."""
    if split == "validation" or rng.random() < 0.4:
        return rng.choice(PLACES[split])
    parts = WORDS["more_places"]
    opening, closing = rng.random() < 0.6, rng.random() < 0.5
    words = [rng.choice(parts["openings"])] * opening + [rng.choice(parts["middles"])]
    return " ".join(words + [rng.choice(parts["closings"])] * (closing or not opening))


def mix_phrasings(rng: random.Random, count: int) -> list[str]:
    """More ways to ask: a sentence for each part of a booking, in any order."""
    phrasings = {}  # a dict keeps its order
    while len(phrasings) < count:
        sentences = [rng.choice(part) for part in MIXED]
        rng.shuffle(sentences)
        phrasings[" ".join(sentences)] = None
    return list(phrasings)


def draw_booking(rng: random.Random, phrasing: str, split: str) -> tuple[dict, dict[str, str]]:
    """The booking as in the JSON, and the text of each slot."""
    first, last = (17, 22) if "dinner" in phrasing.lower() else (12, 14) if "lunch" in phrasing.lower() else (11, 22)
    hour, minute = rng.choice([step for step in TIMES if first <= step[0] <= last])
    guests = choose(rng, GUEST_WEIGHTS)
    if guests == 1 and PLURAL.search(phrasing):
        guests = 2 + int(rng.random() * 11)
    booking = {"name": draw_name(rng, split), "place": draw_place(rng, split), "day": rng.choice(DAYS)}
    booking |= {"time": f"{hour}:{minute:02d}", "guests": guests}
    day = write_day(rng, booking["day"], hour)
    on = day if day.startswith(("this", "to")) else f"on {day}"
    time = write_time(choose(rng, TIME_FORMS), hour, minute)
    return booking, {**booking, "day": day, "on": on, "time": time, **write_guests(rng, guests)}


def surround(rng: random.Random, phrasing: str, split: str) -> str:
    """Add a greeting, an aside and thanks. Nothing may follow a signature, so there the aside comes first."""
    closed = phrasing.endswith((".", "?", "!"))
    if rng.random() < NOISE["aside"]:
        aside = rng.choice(ASIDES[split])
        phrasing = f"{phrasing} {aside}" if closed and rng.random() < 0.5 else f"{aside} {phrasing}"
    if rng.random() < NOISE["greeting"]:
        phrasing = f"{rng.choice(GREETINGS)} {phrasing}"
    return f"{phrasing} {rng.choice(THANKS)}" if closed and rng.random() < NOISE["thanks"] else phrasing


def misspell(rng: random.Random, text: str) -> str:
    """Swap two letters of one word, or drop one. Slots, short words, numbers and capitalized words stay."""
    words = [m for m in re.finditer(r"(?<![{\w'])[a-z]{4,}(?![}\w'])", text) if m.group() not in NUMBERS]
    if not words:
        return text
    word = rng.choice(words)
    i = word.start() + 1 + int(rng.random() * (len(word.group()) - 2))  # never its first letter
    return text[:i] + text[i + 1] + (text[i] if rng.random() < 0.5 else "") + text[i + 2 :]


def write_message(rng: random.Random, phrasing: str, split: str) -> tuple[str, dict]:
    text = surround(rng, phrasing, split)
    booking, slots = draw_booking(rng, text, split)
    text = misspell(rng, text) if rng.random() < NOISE["typo"] else text
    if rng.random() < NOISE["no full stop"]:
        text = text.rstrip(".?!")
    if rng.random() < NOISE["lower case"]:
        return text.lower().format(**slots), booking
    return re.sub(r"(^|[.?!] )([a-z])", lambda m: m[1] + m[2].upper(), text.format(**slots)), booking


def write_messages(rng: random.Random, phrasings: list[str], split: str, count: int) -> list[tuple[str, dict]]:
    """`count` different messages that use each phrasing equally often."""
    messages = {}
    while len(messages) < count:
        text, booking = write_message(rng, phrasings[len(messages) % len(phrasings)], split)
        messages.setdefault(text, booking)
    return rng.sample(list(messages.items()), count)


def main(out_dir: str = "data", seed: int = 1337) -> None:
    """Write bookings/ and intents/, each with train.json and validation.json.

    Args:
        out_dir: The folder that the two data sets go into.
        seed: The same seed gives the same bytes.
    """
    for split in SPLITS:
        rng = random.Random(f"{seed} {split}")
        phrasings = BOOKINGS[split]
        if split == "train":  # nine rows follow each of these, the others, most, a mixed one
            phrasings = 9 * phrasings + mix_phrasings(rng, BOOKING_ROWS[split] - 9 * len(phrasings))
        rows = []
        for text, booking in write_messages(rng, phrasings, split, BOOKING_ROWS[split]):
            answer = json.dumps(booking, ensure_ascii=False, separators=(",", ":"))
            rows.append({"instruction": text, "output": answer})
        write_rows(Path(out_dir) / "bookings" / f"{split}.json", rows)
        rows = []
        for label, phrasings in INTENTS[split].items():
            messages = write_messages(rng, phrasings, split, INTENT_ROWS[split] // len(INTENTS[split]))
            rows += [{"text": text, "label": label} for text, _ in messages]
        rng.shuffle(rows)
        write_rows(Path(out_dir) / "intents" / f"{split}.json", rows)


if __name__ == "__main__":
    cli.run(main)
