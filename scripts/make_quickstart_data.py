"""Writes recipes/quickstart/train.jsonl and test.jsonl: plain requests and the tool call that answers each; and
rehearsal.jsonl: some of what the base can do already, so that it need not forget it.

Deterministic: the same seed gives the same bytes. No request occurs twice, so train and test share no prompt, and
rehearsal none with the forgetting probe. Run it as `python scripts/make_quickstart_data.py`.
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from base_skills import PRACTISED, SKILLS
from base_words import COLORS, DAYS, FOODS, NAMES, QUALITIES, ROOMS, THINGS

from ftune.clean import Contamination, Item

LISTS = ["shopping", "packing", "party"]
LEVELS = ["low", "medium", "high"]
DOORS = ["front", "back", "side", "garage"]
Call = tuple[str, dict[str, Any]]
SEED = 20261122
HARD_TO_KEEP = {"copy": 5, "arithmetic": 4}
"""Rehearsal rows of a skill, as a multiple of the others': what is copied often looks like the requests of the task."""


def set_timer(rng: random.Random) -> Call:
    minutes, label = rng.randint(2, 60), rng.choice(FOODS)
    request = rng.choice([
        f"Set a timer for {minutes} minutes for the {label}.",
        f"Start a {minutes} minute timer for the {label}.",
        f"The {label} needs {minutes} minutes, please set a timer.",
        f"Can you time the {label} for {minutes} minutes?",
        f"I need a timer for the {label}: {minutes} minutes.",
        f"Tell me when the {label} has had {minutes} minutes.",
    ])  # fmt: skip
    return request, {"name": "set_timer", "arguments": {"minutes": minutes, "label": label}}


def set_light(rng: random.Random) -> Call:
    room, color, level = rng.choice(ROOMS), rng.choice(COLORS), rng.choice(LEVELS)
    request = rng.choice([
        f"Make the light in the {room} {color} and {level}.",
        f"Turn the {room} light to {color}, {level} please.",
        f"I want a {level} {color} light in the {room}.",
        f"Light the {room} in {color} at a {level} level.",
        f"Can the {room} have {color} light? Set it to {level}.",
        f"Please set {level} {color} light in the {room}.",
    ])  # fmt: skip
    return request, {"name": "set_light", "arguments": {"room": room, "color": color, "level": level}}


def send_message(rng: random.Random) -> Call:
    name = rng.choice(NAMES)
    text = rng.choice([
        f"the {rng.choice(FOODS)} is {rng.choice(QUALITIES)}",
        f"the {rng.choice(THINGS)} is in the {rng.choice(ROOMS)}",
        f"I found the {rng.choice(COLORS)} {rng.choice(THINGS)}",
        f"we need {rng.choice(FOODS)} and {rng.choice(FOODS)}",
    ])  # fmt: skip
    request = rng.choice([
        f"Tell {name} that {text}.",
        f"Send {name} a message: {text}.",
        f"Write to {name} that {text}.",
        f"Let {name} know that {text}.",
        f"Please message {name}: {text}.",
        f"Can you tell {name} that {text}?",
    ])  # fmt: skip
    return request, {"name": "send_message", "arguments": {"to": name, "text": text}}


def add_item(rng: random.Random) -> Call:
    count, item, which = rng.randint(1, 20), rng.choice(FOODS + THINGS), rng.choice(LISTS)
    request = rng.choice([
        f"Add {count} {item} to the {which} list.",
        f"Put {item} on the {which} list, {count} of them.",
        f"The {which} list needs {count} {item}.",
        f"I need {count} {item}, add it to my {which} list.",
        f"Please write {item}, count {count}, on the {which} list.",
        f"On the {which} list: {count} {item}.",
    ])  # fmt: skip
    return request, {"name": "add_item", "arguments": {"list": which, "item": item, "count": count}}


def set_alarm(rng: random.Random) -> Call:
    day, hour, repeat = rng.choice(DAYS), rng.randint(1, 23), rng.random() < 0.5
    when = f"every {day}" if repeat else rng.choice([f"on {day}", f"this {day}"])
    request = rng.choice([
        f"Wake me at {hour} {when}.",
        f"Set an alarm for {hour} {when}.",
        f"I want to get up at {hour} {when}.",
        f"Please set the alarm {when} at {hour}.",
        f"I need an alarm {when} at {hour}.",
        f"Can you wake me {when} at {hour}?",
    ])  # fmt: skip
    return request, {"name": "set_alarm", "arguments": {"day": day, "hour": hour, "repeat": repeat}}


def book_table(rng: random.Random) -> Call:
    name, people, day = rng.choice(NAMES), rng.randint(2, 12), rng.choice(DAYS)
    request = rng.choice([
        f"Book a table for {people} people on {day}, name {name}.",
        f"Get a table for {name} on {day}, {people} people.",
        f"{name} wants a table for {people} on {day}.",
        f"On {day} we are {people} people, book a table for {name}.",
        f"Can you book {day} for {people} people under {name}?",
        f"Please book a table under {name} for {people} on {day}.",
    ])  # fmt: skip
    return request, {"name": "book_table", "arguments": {"name": name, "people": people, "day": day}}


def set_heating(rng: random.Random) -> Call:
    room, degrees = rng.choice(ROOMS), rng.randint(10, 29)
    request = rng.choice([
        f"Heat the {room} to {degrees} degrees.",
        f"Make it {degrees} degrees in the {room}.",
        f"Set the heating in the {room} to {degrees}.",
        f"I want {degrees} degrees in the {room}.",
        f"The {room} is cold, set it to {degrees} degrees.",
        f"Can you bring the {room} to {degrees} degrees?",
        f"Please put the {room} heating at {degrees}.",
        f"{degrees} degrees in the {room}, please.",
    ])  # fmt: skip
    return request, {"name": "set_heating", "arguments": {"room": room, "degrees": degrees}}


def lock_door(rng: random.Random) -> Call:
    door, locked, name = rng.choice(DOORS), rng.random() < 0.5, rng.choice(NAMES)
    word, state = ("Lock", "locked") if locked else ("Open", "open")
    request = rng.choice([
        f"{word} the {door} door for {name}.",
        f"{name} wants the {door} door {state}.",
        f"Please {word.lower()} the {door} door, {name} is here.",
        f"Can you {word.lower()} the {door} door for {name}?",
        f"The {door} door should be {state} for {name}.",
        f"I want the {door} door {state}, tell {name}.",
    ])  # fmt: skip
    return request, {"name": "lock_door", "arguments": {"door": door, "locked": locked, "name": name}}


TOOLS: list[Callable[[random.Random], Call]] = [
    set_timer, set_light, send_message, add_item, set_alarm, book_table, set_heating, lock_door,
]  # fmt: skip


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        request, call = rng.choice(TOOLS)(rng)
        answer = json.dumps(call)
        rows[request] = conversation(request, answer)
    return list(rows.values())


def conversation(request: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}


def make_rehearsal(per_skill: int, seed: int, probe: Path, multiples: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of every skill that the probe asks for; none holds what the probe asks, in other words around it either."""
    rng = random.Random(seed)
    items = [json.loads(line) for line in probe.read_text(encoding="utf-8").splitlines()]
    asked = [[m["content"] for m in item["messages"]] for item in items if "messages" in item]
    probed = Contamination(Item(question, question, answer) for question, answer in asked)
    taken = {question for question, _ in asked}
    rows: list[dict[str, Any]] = []
    for name, skill in SKILLS.items():
        wanted = len(rows) + (0 if name in PRACTISED else per_skill * multiples.get(name, 1))
        while len(rows) < wanted:
            [(request, answer)] = skill(rng)
            if request not in taken and not probed.find([request], [answer]):
                taken.add(request)
                rows.append(conversation(request, answer))
    rng.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parents[1] / "recipes" / "quickstart"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--train", type=int, default=4000, help="training rows")
    parser.add_argument("--test", type=int, default=300, help="test rows")
    parser.add_argument("--rehearsal", type=int, default=200, help="rehearsal rows of most skills")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()

    rows = make_rows(options.train + options.test, options.seed)
    parts = {
        "train.jsonl": rows[: options.train],
        "test.jsonl": rows[options.train :],
        "rehearsal.jsonl": make_rehearsal(options.rehearsal, options.seed, default / "probe.jsonl", HARD_TO_KEEP),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (options.output / name).write_text(text, encoding="utf-8")
        print(f"{options.output / name}: {len(part)} rows")


if __name__ == "__main__":
    main()
