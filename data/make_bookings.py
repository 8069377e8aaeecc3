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


def listed(text: str, separator: str = "[|]") -> list[str]:
    return [" ".join(entry.split()) for entry in re.split(separator, text) if entry.strip()]


# How often each way to write a time is used, in percent.
TIME_FORMS = {"19:30": 55, "19.30": 15, "19h30": 15, "1930h": 15}
DAY_FORMS = {"Friday": 40, "Fri": 18, "friday": 12, "this Friday": 15, "Friday evening": 15}
NOISE = {"greeting": 0.2, "aside": 0.1, "thanks": 0.12, "typo": 0.15, "lower case": 0.1, "no full stop": 0.15}

WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
TIMES = [(hour, minute) for hour in (12, 13, 14, 17, 18, 19, 20, 21) for minute in (0, 15, 30, 45)]
GUEST_WEIGHTS = {1: 5, 2: 10, 3: 9, 4: 11, 5: 10, 6: 11, 7: 9, 8: 9, 9: 7, 10: 7, 11: 6, 12: 6}
PEOPLE = ["{} people", "{} people", "{} guests", "a party of {}", "a group of {}", "{} of us", "{} ppl"]
WE = ["there will be {} of us", "there are {} of us", "we are {}", "we'll be {}", "we will be {} people", "it's for {}"]
GREETINGS = ["Hi!", "Hello!", "Hey there!", "Good day.", "Hi team!", "Dear all."]
THANKS = ["Thanks!", "Thank you.", "Many thanks.", "Thx!", "Much appreciated."]
# A reader sees that the days, numbers and names in these are not the booking's.
ASIDES = {
    "train": ["We loved it last time.", "One of us eats no meat.", "We came on Monday last time.", "The soup is great.",
              "Last time 4 of us came.", "In June we stayed until 23:00.", "My last booking, on a Tuesday, was for 8.",
              "It is far better than at home.", "The lady who works there is kind.", "My neighbour Ruth told me."],
    "validation": ["The view is lovely.", "Two of us cannot eat nuts.", "On Thursday nobody picked up the phone.",
                   "I rang at 9:15 but nobody answered.", "My neighbour praised the fish.",
                   "Not table 3 again, please.", "It beats cooking any day.", "Your Sunday roast is famous."],
}

# With these words in a message one guest would read oddly ("1 seats", "we are one").
PLURAL = re.compile(r"(?i)(?<!{)\b(we|us|our|seats|chairs|covers|heads|ppl|people|friends|club|company|group|mouths)\b")
WORDS = json.loads((Path(__file__).parent.parent / "data" / "words.json").read_text(encoding="utf-8"))
NAMES, PLACES = WORDS["names"], WORDS["places"]

# A phrasing that says dinner or lunch is only given such hours (see draw_booking).
BOOKINGS = {
    "train": listed("""
    Could {place} fit {people} {on}, say {time}? Ask for {name}. | Can we come to {place} {on}? {we} at {time}. - {name}
    Kindly arrange a table for {people} at {place}. Date: {day}, {time}. {name} | {place} {day} {time}, {people}, {name}
    I'd like a table for {n} at {place} {on} at {time}. My name is {name}. | Need {place} {day} @ {time} for {n}. {name}
    My family wants to go to {place}. {we}, {day}, {time}. Sign us up as {name}. | {name}, {n}, {place}, {day}, {time}.
    Please book {place} for {people}, {day} at {time}, under {name}. | its {name}, {people} for {place} {day} {time} pls
    {name} here. Is there room for {people} at {place} {on} at {time}? | Table for {n}, {time}, {day}, {place}. ({name})
    Hoping to eat at {place} {on}. {we}, arriving at {time}. Regards, {name} | {place}? {we} {on}. {time} please. {name}
    {name} would like to visit {place} {on}; table for {n}, {time}. | Save {n} seats for {name} at {place}, {time} {on}.
    We want to celebrate at {place} {on} at {time}. {we}. The booking is for {name}.
    Reserve me a spot at {place}, {people}, {on} at {time}. It's {name}. | book {place} {time} {day} {n} ppl name {name}
    {people} {on}, please, at {place} from {time}. I am {name}. | {day}, {time}, {people} at {place}. Book it as {name}.
    This is {name}. Put {people} down at {place} for {time} {on}. | Is {place} free {on} at {time}? I'm {name} and {we}.
    Squeeze {people} into {place} at {time} {on}? Name: {name} | At {time} {on} we'd love to be at {place}. {we}. {name}
    My name is {name} and I need a table {on} at {time}. {place}, {people}.
    Hopefully {time} at {place}, {day}. {we}. This is {name}. | Anything at {place} {on} at {time}? {we}. Signed, {name}
    Dinner at {place} {on}, {time}, for {people}. Name is {name}. | A booking for {name}: {n} at {place}, {day}, {time}.
    Lunch for {n} {on} at {time}? It's {name}, and we want {place}. | A spot for {name} {on}: {place}, {time}, {people}.
    When: {day} {time}. Where: {place}. Who: {name}. Size: {n}. | Book us into {place}. {day}. {time}. {people}. {name}.
    {n} of us fancy {place} {on}. {time} if possible. ({name}) | My partner chose {place}. For {n}, {on}, {time}. {name}
    Good for {place}? {day} {time}, {people}. {name} speaking. | Would {time} {on} suit {people} at {place}? Thx, {name}
    Under {name} please: {place}, {people}, {time}, {day}. | Reservation: {name}, {time}, {place}, {people}, {day}.
    {we} {on}, and we would like to sit down at {time} in {place}. {name} is the name.
    Any luck with {place}? {time} {on}, {people}. Cheers, {name} | Pencil in {name} for {time} {on}: {people}, {place}.
    For my birthday I want {place}. {on} at {time}, {people}, {name}. | Greg picks {place}, {on} at {time}. {we}. {name}
    Tell {place} that {name} needs a table for {n} {on} at {time}. | Let's do {place} {on}: {people}, {time}, as {name}.
    Name: {name}. Place: {place}. Day: {day}. Time: {time}. Guests: {n}.
    Request: {day}, {place}, {n} covers, {time}. Ask {name}. | To {place}: {name} seeks a table for {n} {on} at {time}.
    {people} at {time}. {place}, {day}. Say it's for {name}. | We're after {n} seats at {place}, {day}, {time}. {name}
    Dagny told me to write to you about {place}. {name}, table for {n}, {day}, {time}.
    We'd like to have our party at {place} {on}. {we} and the start is {time}. Yours, {name}
    Please hold a table: {place}, {on} at {time}, for {people}. Hold it for {name}.
    It would be lovely to eat at {place} at {time} {on}. {we}. Kind regards, {name}
    We plan to arrive at {time} {on}. Please seat {people} at {place}. My name: {name}.
    Our team meets at {place} {on}, {time} sharp. {we}. Book under {name}.
    Put my name, {name}, on a table for {n} at {place} for {day}, {time}.
    We are in Porto {on} and want to try {place}. {time}, {people}. - {name}
    I'm writing for a table at {place}. The day is {day}, the hour {time}, and {we}. {name}
    I want to reserve at {place} for {people}. I would come {on} at {time}. Call me {name}.
    Is there still a table at {place} {on}? {people}, {time}, the name {name}.
    {name} again! Same place, {place}, but {on} at {time} this time. {we}.
    After the Tulip Parade {on} we'd come over to {place}, at {time}. {we}. {name}
    Does {place} take bookings for {day}? If so: {n} at {time}, name {name}.
    Looking for a quiet corner at {place} for {people}, {on} at {time}. - {name}
    Make it {place} at {time} {on}, {people}, and put {name} on the list.
    If {place} has space {on}, {name} would take a table for {n} at {time}.
    I promised Aunt Vera a meal at {place} {on}. Can we get a table for {n} at {time}? {name}
    Count: {n}. Arrival: {time}, {day}. Restaurant: {place}. Guest name: {name}.
    Hold {n} chairs for us at {place} {on}. We get there at {time}. {name}
    thinking {place}, {time}, {day}. {n} of us. ok? {name} | {day} works. {place}, {time}, {people}, name {name}.
    May I have a table at {place} at {time}? I'd come {on}, {people}. With thanks, {name}
    It's {name} from the Harbour Choir. {we}, and we'd like {place}, {day}, {time}.
    Is it possible to get {people} in at {place} {on}, for {time}? Many thanks, {name}
    My boss Cyril wants {place} {on} at {time}, a table for {n}. Put it under {name}.
    Please tell me {place} has a table for {n} at {time} {on}! Fingers crossed, {name}
    Grandpa Ivo swears by {place}. A table for {n} at {time} {on} please. Yours, {name}
    My sister's wedding is {day}! We chose {place}, {time}, {people}. Greetings, {name}
    It's our anniversary {on}. {place} at {time} sounds great, for {n}. Warmly, {name}
    Cousin Bela and I argue, but we go to {place}. {day}, {time}, {people}. I am {name}.
    With the Chess Society {day} to {place}. {time}. {we}. {name} | Plan: {people}, {place}, {day}, {time}; ask {name}
    {name} plus guests, {n} altogether, for {place} {on}, {time}. | {n} hikers need {place} {on}, {time}. Call {name}.
    I saw {place} on TV. {name} would like {time} {on}. {people}.
    {place} gets busy, I know. Could {name} come {on} at {time}? {we}.
    {time} {day} at {place} pls, its for {n}, {name}""", "[|\n]"),
    "validation": listed("""
    Lunch or dinner? Dinner, at {place}, {on} at {time}, {people}. Host: {name}.
    Uncle Otis raves about {place}. Please have all ready for {n} {on} at {time}. Thank you, {name}
    Are you open {on}? Then give us {place} at {time}. {we}. It was {name} who asked.
    {n} hungry friends want {place} {on}, {time}! Their host is {name}.
    Arrange for {people} to eat at {place}. We'd walk in at {time}, {day}. The reservation goes to {name}.
    How full is {place} {on}? I'd take a table at {time} for {people}, and you may note down {name}.
    Venue: {place}. Hour: {time}, {day}. Party of {n}. Contact: {name}.
    Note: {people}, {day}, {time}, venue {place}, contact {name}.
    Give {name} a table for {n} at {place}, {time}, {day}. | From {name}: we'll drop by {place} at {time} {on}. {we}.
    Off to {place} with the Tuba Club {day}. Be there at {time}. {we}. {name}
    I hear {place} fills up fast, so may {name} have {time} {on}? {people}.
    Party size {n}; day {day}; venue {place}; start {time}; lead guest {name}.
    Our daughter's big day is {day}. {place} at {time} would be perfect, {n} at the table. Love, {name}
    Greek or Thai, we can't agree, but {place} it is. {day}, {time}, {people}. The list should say {name}.
    {time} on the dot, {place}, {day}: we want room for {n}. Please list me as {name}.
    You can expect {people} at {place} {on}. {name} leads the way, {time} is when we come in.
    Sort me out with dinner in {place}, would you? {name}, {time}, {day}, {people}.
    I read about {place} in the paper and want in: {day}, {time}, {people}. They call me {name}.
    The guest is {name}, the venue {place}, the hour {time}, the day {day}, the number {n}.
    Would a lunch table for {n} be going at {place}? {day}, {time}. Yours truly, {name}
    {people} for {place} {on}, coming at {time}, contact person {name}.
    For my mother's birthday: {place} {on}, doors at {time}, {people}. Host is {name}.
    Just {place} {on}, {time}, {people}; the guest of honour is {name}.
    Get {people} sorted for {place}, will you? {name} will be at the door {on} at {time}.
    If you still have a gap {on}, {place} could host us at {time}. {we}. Sincerely, {name}
    {name} and company, {n} in all, want to eat at {place} {on}, {time}.""", "[|\n]"),
}

MIXED = [  # sentences for the place and the time, for the guests, for the name
    listed("""We'd like {place} {on} at {time}. | Is {place} free {on}, {time}? | The place is {place}, the time {time}
        {on}. | {day}, {time}, {place}. | Book {place}, please: {time}, {day}. | {place} {on} would be nice, say {time}.
        | Restaurant: {place}; day: {day}; time: {time}. | At {time} {on} we want to be at {place}. | {place} for {day}
        at {time}? | Please look at {day}, {time}, for {place}. | Hey {place}, anything {on} at {time}? | Our choice is
        {place}, {time} {on}. | I vote for {place}, {day} at {time}. | Doors of {place} at {time}, {day}!"""),
    listed("""{we}. | Table for {n}. | {people}. | It's {people}. | Number of guests: {n}. | Make that {people}, please.
        | Size of the party: {n}. | Seats: {n}. | Bring chairs for {n}! | Expect {people}. | {n} in all."""),
    listed("""My name is {name}. | Put it under {name}. | {name} here. | The name is {name}. | Booked by {name}. |
        Guest: {name}. | Contact is {name}. | {name} will pay. | I'm {name}. | List it for {name}. | Ask for {name}. |
        It's me, {name}. | Thank {name} for the idea, it's on that name. | {name} is the host."""),
]

INTENTS = {
    "train": {
        "book": listed("""Can you book {people} in at {place} {on}? | One table at {place} for {n}, {day} at {time}. |
            We cancelled our trip, so let's eat at {place} {on}. Table for {n} please. | {place} {day} {time} for {n},
            {name} | Our holiday plans changed, so we want a table at {place} {on}, for {n}. | Reserve {place} for
            {name} {on}, {people}. | New reservation please: {name}, {people}, {day}. | A table for {people} {on} at
            {time}, please. | My old booking can stay as it is, I just want another table {on} at {time}. {name} | Do
            you have a free table at {place} at {time} {on}? I'd take it. {name} | Will you take {people} at {time}?
            We'd like to come to {place} {on}. | I have a question on parking, but first book me {day} at {time}."""),
        "change": listed("""Can you move my booking at {place} to {time}? | I booked a table {on} but {time} is better
            now. {name} | Please change the reservation for {name} to {people}. | Could you switch our {place} table to
            {day}? | There are more of us than I said: {n}. Same table at {place}. | I got the day wrong. {name} should
            be {on}. | I don't want to cancel, only to come at {time} rather than earlier. {name} | We're running late
            for {place}. Make it {time} please. {name} | Keep my table at {place} but make it for {n}. | Can you push
            back what I booked at {place} until {time}? | Some friends cancelled, so our table {on} should be for {n}
            now. {name} | Book me for {time} rather than the hour I gave you before. {name}, {place}."""),
        "cancel": listed("""Please cancel my table at {place} {on}. | We can't make it {on} after all. Sorry! {name} | I
            booked for {people} {on}, but drop it please, we are ill. | Something came up, so {place} at {time} is off.
            {name} | Give our table {on} to someone else. {name} | Forget about {day}, we won't come to {place}. | No
            need to change the time, just take {name} off the list for {day}. | Can you delete the reservation at
            {place} for {n}? | Scrap my {time} reservation {on}, please. | I'd love to book again one day, but {on} I
            have to call it off. {name} | Instead of moving it again, let's simply not come {on}. {name} | You asked if
            we still want the table at {time}: no, thank you. {name}"""),
        "ask": listed("""Does {place} have vegan dishes {on}? | Is there parking near {place}? We come {on}. | What
            happens if I cancel after {time} {on}? | Until when can one change a booking at {place} {on}? | How much is
            the set menu at {place} for {n}? | Are dogs allowed at {place} {on}? | Do I have to book at {place} {on} or
            can one just walk in? | Did my reservation {on} go through? {name} | Is the kitchen still open at {time}
            {on}? | Can you tell me what time I booked {on}? {name} | I don't want to change anything, but is there a
            high chair at {place}? {name} | If a group of {n} cancels, do you charge a fee at {place}?"""),
    },
    "validation": {
        "book": listed("""Find a spot for {people} at {place} {on}! | {name} wants to dine at {place}, {day}, {time}. |
            Since the other restaurant cancelled, may {n} of us come {on} at {time}? | We'd be happy to visit {place}
            {on}. Kindly note {people}. {name} | My table needs no change, but give me another {on} at {time}."""),
        "change": listed("""My visit to {place} needs a different hour: {time}. | Rather than cancel, shift {name} to
            {day}. | We'll be {n}, not what I wrote when booking {place}. Please correct it. {name} | Could we start at
            {time} {on} instead? {name} | Turns out {day} is better for us. Please update our table at {place}."""),
        "cancel": listed("""Sadly none of us is able to come {on}, so free up the table at {place}. | Please annul my
            table {on}. {name} | {name} will not be needing the table at {time} any more. | I know I changed it twice
            already, but now our visit to {place} {on} is dead. | Kindly undo the reservation for {people} {on}."""),
        "ask": listed("""Does it cost anything to call off a visit to {place}? It would be {day}. | What is the dress
            code at {place} {on}? | By when must one book for {day} at {place}? | Has the table for {name} been moved to
            {day} yet? | Who do I talk to about a change of menu at {place}? - {name}"""),
    },
}


def choose(rng: random.Random, weights: dict) -> object:
    return rng.choices(list(weights), list(weights.values()))[0]


def write_time(form: str, hour: int, minute: int) -> str:
    past = f"{minute:02d}"
    short = {"19h30": f"{hour}h{past if minute else ''}", "1930h": f"{hour}{past}h"}
    return short.get(form) or form.replace("19", str(hour)).replace("30", past)


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
    booking = {"name": draw_name(rng, split), "place": draw_place(rng, split),
               "day": rng.choice(WEEKDAYS + ["today", "tomorrow"]), "time": f"{hour}:{minute:02d}", "guests": guests}
    day = write_day(rng, booking["day"], hour)
    form = choose(rng, TIME_FORMS)
    slots = {"name": booking["name"], "place": booking["place"], "day": day,
             "on": day if day.startswith(("this", "to")) else f"on {day}",
             "time": write_time(form, hour, minute)}
    return booking, slots | write_guests(rng, guests)


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
    return text[:i] + text[i + 1] + (text[i] if rng.random() < 0.5 else "") + text[i + 2:]


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
        rows = [{"instruction": text, "output": json.dumps(booking, ensure_ascii=False, separators=(",", ":"))}
                for text, booking in write_messages(rng, phrasings, split, BOOKING_ROWS[split])]
        write_rows(Path(out_dir) / "bookings" / f"{split}.json", rows)
        rows = [{"text": text, "label": label} for label, phrasings in INTENTS[split].items()
                for text, _ in write_messages(rng, phrasings, split, INTENT_ROWS[split] // len(INTENTS[split]))]
        rng.shuffle(rows)
        write_rows(Path(out_dir) / "intents" / f"{split}.json", rows)


if __name__ == "__main__":
    cli.run(main)
