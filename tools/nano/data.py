"""Training data of step35-nano: Python's standard library, and dialogues in the model's chat format.

Dialogues are generated from word lists and random strings, so that what a tool call needs has to be copied
from the request instead of remembered. Held-out dialogues use another seed and, for whatever is copied, other
values; held-out source files are chosen by a hash of their path.
"""

import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2.sandbox
from tokenizers import Tokenizer

from tools.nano.words import (
    ADJECTIVES,
    CITIES,
    CODE,
    COUNTRIES,
    EMOJI,
    ENUMS,
    FACTS,
    NAMES,
    NOUNS,
    PHRASES,
    VERBS,
    ZH_CITIES,
    ZH_FACTS,
)

NANO = Path(__file__).parents[2] / "mlx_step35" / "nano"
BOS = "<｜begin▁of▁sentence｜>"
SOURCE_SHARE = 0.33  # of tokens
DRILL_SHARE = 0.25  # of training dialogues; the skill behind every tool call is copying from far back

Message = dict[str, Any]
Tool = dict[str, Any]


@cache
def template() -> jinja2.Template:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    return env.from_string((NANO / "chat_template.jinja").read_text())


def render(messages: list[Message], tools: list[Tool] | None = None, generate: bool = False) -> str:
    return template().render(messages=messages, tools=tools, bos_token=BOS, add_generation_prompt=generate)


# --- values to copy -------------------------------------------------------------------------------------


class Values:
    """Random values; `heldout` draws the syllables of made-up words from another order and the odd names."""

    def __init__(self, rng: random.Random, heldout: bool) -> None:
        self.rng, self.heldout = rng, heldout

    def pick(self, items: list[Any]) -> Any:
        """Every seventh entry is kept for held-out dialogues."""
        part = [x for i, x in enumerate(items) if (i % 7 == 3) == self.heldout]
        return self.rng.choice(part or items)

    def word(self) -> str:
        consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
        word = "".join(
            self.rng.choice(consonants) + self.rng.choice(vowels)
            for _ in range(self.rng.choice([2, 2, 2, 3]))
        )
        return word + self.rng.choice(["", "", "n", "r", "s", "x", "t"])

    def noun(self) -> str:
        return self.rng.choice(NOUNS)

    def term(self) -> str:
        """Mostly a known word, else a made-up one."""
        return self.noun() if self.rng.random() < 0.7 else self.word()

    def city(self) -> str:
        return self.word().capitalize() if self.rng.random() < 0.3 else self.pick(CITIES)

    def name(self) -> str:
        return self.word().capitalize() if self.rng.random() < 0.3 else self.pick(NAMES)

    def text(self) -> str:
        r = self.rng.random()
        if r < 0.25:
            return self.pick(PHRASES)
        words = [
            self.term() if self.rng.random() < 0.75 else self.rng.choice(ADJECTIVES)
            for _ in range(self.rng.randint(1, 4))
        ]
        if r < 0.35:
            words.insert(self.rng.randrange(len(words) + 1), str(self.integer()))
        text = " ".join(words)
        return text + self.rng.choice(["", "", "", "!", " " + self.rng.choice(EMOJI)])

    def integer(self) -> int:
        return self.rng.choice(
            [self.rng.randint(0, 9), self.rng.randint(10, 99), self.rng.randint(100, 9999)]
        )

    def number(self) -> float:
        return round(self.rng.uniform(0, 100), self.rng.choice([1, 2]))

    def boolean(self) -> bool:
        return self.rng.random() < 0.5

    def identifier(self) -> str:
        return self.term() + "_" + self.term()

    def path(self) -> str:
        parts = [self.term() for _ in range(self.rng.randint(1, 3))]
        return (
            self.rng.choice(["", "/", "./"])
            + "/".join(parts)
            + self.rng.choice([".py", ".txt", ".md", ".json", ""])
        )

    def date(self) -> str:
        return f"20{self.rng.randint(20, 39)}-{self.rng.randint(1, 12):02}-{self.rng.randint(1, 28):02}"

    def time(self) -> str:
        return f"{self.rng.randint(0, 23):02}:{self.rng.randint(0, 59):02}"

    def email(self) -> str:
        return f"{self.word()}@{self.word()}.{self.rng.choice(['com', 'org', 'net'])}"

    def url(self) -> str:
        return f"https://{self.word()}.{self.rng.choice(['com', 'org', 'net'])}/{self.noun()}"

    def code(self) -> str:
        return self.rng.choice(CODE).format(a=self.term(), b=self.word(), n=self.integer())

    def strings(self) -> list[str]:
        return [self.term() for _ in range(self.rng.randint(1, 3))]

    def mapping(self) -> dict[str, Any]:
        return {
            self.noun(): self.rng.choice([self.integer, self.word, self.boolean])()
            for _ in range(self.rng.randint(1, 2))
        }


KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    # kind: (JSON schema, parameter names)
    "city": ({"type": "string"}, ["city", "location", "place"]),
    "name": ({"type": "string"}, ["name", "user", "person", "to"]),
    "text": ({"type": "string"}, ["text", "query", "title", "message", "note", "content", "subject"]),
    "integer": ({"type": "integer"}, ["count", "days", "limit", "amount", "size", "line", "number"]),
    "number": ({"type": "number"}, ["price", "weight", "ratio", "x"]),
    "boolean": ({"type": "boolean"}, ["force", "verbose", "recursive", "urgent"]),
    "identifier": ({"type": "string"}, ["key", "id", "variable", "field"]),
    "path": ({"type": "string"}, ["path", "file", "folder", "filename"]),
    "date": ({"type": "string"}, ["date", "day", "until"]),
    "time": ({"type": "string"}, ["time", "at"]),
    "email": ({"type": "string"}, ["email", "address"]),
    "url": ({"type": "string"}, ["url", "link"]),
    "code": ({"type": "string"}, ["code", "command", "expression"]),
    "strings": ({"type": "array", "items": {"type": "string"}}, ["tags", "items", "names"]),
    "mapping": ({"type": "object"}, ["options", "data", "filter"]),
    "enum": ({"type": "string"}, ["unit", "mode", "color", "level", "format"]),
}
KIND_WEIGHTS = {"text": 4, "integer": 3, "path": 3, "city": 2, "name": 2, "code": 2, "boolean": 2}


def tool_of(name: str, parameters: dict[str, dict[str, Any]], rng: random.Random) -> Tool:
    required = [p for i, p in enumerate(parameters) if i == 0 or rng.random() < 0.6]
    schema = {"type": "object", "properties": parameters, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": name.replace("_", " ").capitalize(), "parameters": schema},
    }


class Signature:
    """A tool with the kinds of its parameters."""

    def __init__(self, values: Values, name: str | None = None) -> None:
        rng = values.rng
        verb, noun = rng.choice(VERBS), values.term()
        self.name = name or rng.choice([f"{verb}_{noun}", f"{verb}_{noun}", f"{noun}_{verb}", verb])
        kinds = list(KINDS)
        chosen = rng.choices(kinds, [KIND_WEIGHTS.get(k, 1) for k in kinds], k=rng.choice([1, 1, 2, 2, 3]))
        self.kinds: dict[str, str] = {}
        self.enums: dict[str, list[str]] = {}
        properties: dict[str, dict[str, Any]] = {}
        for kind in chosen:
            schema, names = KINDS[kind]
            parameter = rng.choice(names)
            if parameter in self.kinds:
                continue
            self.kinds[parameter] = kind
            if kind == "enum":
                self.enums[parameter] = rng.choice(ENUMS)
                schema = {**schema, "enum": self.enums[parameter]}
            properties[parameter] = schema
        self.tool = tool_of(self.name, properties, rng)

    def arguments(self, values: Values) -> dict[str, Any]:
        required = self.tool["function"]["parameters"]["required"]
        return {
            p: values.rng.choice(self.enums[p]) if kind == "enum" else getattr(values, kind)()
            for p, kind in self.kinds.items()
            if p in required or values.rng.random() < 0.6
        }


# --- turns ----------------------------------------------------------------------------------------------


def spoken(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def quoted(value: Any) -> str:
    """A value as most users set it off: in quotes if it begins like a word, else on its own line."""
    text = spoken(value)
    return f'"{text}"' if text[:1].isalnum() and '"' not in text else f"\n{text}\n"


def request(signature: Signature, arguments: dict[str, Any], rng: random.Random) -> str:
    """How a user asks for this call. A third of the wordings let values run into the sentence."""
    what = signature.name.replace("_", " ")
    name = rng.choice([what, f"`{signature.name}`"])
    style = rng.randrange(9)
    pairs = [(k, spoken(v)) for k, v in arguments.items()]
    set_off = [(k, quoted(v)) for k, v in arguments.items()]
    if style == 0:
        return f"Please {what}: " + ", ".join(f"{k} {v}" for k, v in pairs)
    if style == 1:
        return f"{what.capitalize()} with " + " and ".join(f"{k} {v}" for k, v in pairs) + "."
    if style == 2:
        return f"请{what}，" + "，".join(f"{k} 是 {v}" for k, v in pairs) + "。"
    if style == 3:
        return f"Can you {name}? " + " ".join(f"The {k} is {v}." for k, v in set_off)
    if style == 4:
        return f"Please {name} with " + ", ".join(f"{k} = {v}" for k, v in set_off)
    if style == 5:
        return f"请{name}，" + "，".join(f"{k} 是{v}" for k, v in set_off) + "。"
    if style == 6:
        return f"I need to {name}.\n" + "\n".join(f"{k}:\n{v}" for k, v in pairs)
    if style == 7:
        return "\n".join(f"{k}:\n{v}" for k, v in pairs) + f"\nNow {name}."
    return f"Use {name}\n" + "\n".join(f"{k}:\n{v}" for k, v in pairs)


def call(name: str, arguments: dict[str, Any]) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def think_call(names: list[str], rng: random.Random) -> str:
    joined = " and ".join(f"`{name}`" for name in names)
    return rng.choice(
        [f"I call {joined}.", f"I should use {joined}.", f"The tool {joined} fits.", f"This needs {joined}."]
    )


def result_and_answer(signature: Signature, arguments: dict[str, Any], values: Values) -> tuple[str, str]:
    """What the tool returns and what the assistant makes of it."""
    rng = values.rng
    first = spoken(next(iter(arguments.values()))) if arguments else signature.name
    style = rng.randrange(8)
    if style == 0:
        key, value = values.noun(), values.integer()
        return json.dumps({key: value}), f"The {key} is {value}."
    if style == 1:
        word = values.term()
        return json.dumps({"status": "ok", "id": word}), f'Done, the id is "{word}".'
    if style == 2:
        reason = values.rng.choice(["not found", "permission denied", "timeout", "invalid " + values.noun()])
        return f"Error: {reason}", f"That failed: {reason}."
    if style == 3:
        temperature, sky = values.integer() % 40, rng.choice(["sunny", "cloudy", "rainy", "windy"])
        return json.dumps(
            {"temperature": temperature, "sky": sky}
        ), f"It is {sky} with {temperature} degrees {rng.choice(EMOJI)}"
    if style == 4:
        text = values.text()
        return text, f"The result is:\n{text}"
    if style == 5:
        items = values.strings()
        return json.dumps(items), "I found " + ", ".join(f'"{item}"' for item in items) + "."
    if style == 6:
        return "ok", f"Done:\n{first}"
    a, b = values.noun(), values.term()
    return json.dumps({a: b, "count": values.integer()}, ensure_ascii=False), f'The {a} is "{b}".'


def tool_turn(signatures: list[Signature], values: Values) -> tuple[list[Message], list[Message]]:
    """A request, one or more calls, their results and an answer; also the calls alone."""
    rng = values.rng
    signature = rng.choice(signatures)
    several = rng.random() < 0.15
    all_arguments = [signature.arguments(values) for _ in range(2 if several else 1)]
    text = "\nAlso: ".join(request(signature, a, rng) for a in all_arguments)
    if rng.random() < 0.1:
        text = rng.choice(["Hi! ", "Hello, ", "Quick one: ", "Thanks. "]) + text
    calls = [call(signature.name, a) for a in all_arguments]
    pairs = [result_and_answer(signature, a, values) for a in all_arguments]
    said = "" if rng.random() < 0.75 else rng.choice(["Let me do that.", "One moment.", "Sure."])
    messages: list[Message] = [
        {"role": "user", "content": text},
        {
            "role": "assistant",
            "reasoning_content": think_call([signature.name], rng),
            "content": said,
            "tool_calls": calls,
        },
        *({"role": "tool", "content": result} for result, _ in pairs),
        {
            "role": "assistant",
            "reasoning_content": rng.choice(["I have the result.", "The tool answered.", "I report it."]),
            "content": " ".join(answer for _, answer in pairs),
        },
    ]
    return messages, calls


def refusal_turn(signatures: list[Signature], values: Values) -> list[Message]:
    other = Signature(values)
    what = other.name.replace("_", " ")
    if any(other.name == s.name for s in signatures):
        return plain_turn(values)
    return [
        {"role": "user", "content": request(other, other.arguments(values), values.rng)},
        {
            "role": "assistant",
            "reasoning_content": "No tool fits.",
            "content": f"Sorry, I have no tool to {what}.",
        },
    ]


def plain_turn(values: Values) -> list[Message]:
    rng = values.rng
    style = rng.randrange(13)
    if style == 0:
        country, capital = rng.choice(COUNTRIES)
        question, thought, answer = (
            rng.choice(
                [
                    f"What is the capital of {country}?",
                    f"Name the capital of {country}.",
                    f"capital of {country}?",
                ]
            ),
            f"The capital of {country} is {capital}.",
            f"The capital of {country} is {capital}.",
        )
    elif style == 1:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        question, thought, answer = f"What is {a} + {b}?", f"{a} + {b} = {a + b}", f"{a} + {b} is {a + b}."
    elif style == 2:
        text = values.text()
        question, thought, answer = f"Repeat after me:\n{text}", "I repeat the text.", text
    elif style == 3:
        name = values.name()
        question, thought, answer = (
            f"Hi, my name is {name}.",
            f"The user is called {name}.",
            f"Nice to meet you, {name}! {rng.choice(EMOJI)}",
        )
    elif style == 4:
        question, thought, answer = rng.choice(FACTS)
    elif style == 5:
        question, thought, answer = rng.choice(ZH_FACTS)
    elif style == 6:
        old, new = values.identifier(), values.identifier()
        body = f"def {old}({values.word()}):\n    return {values.word()} + {values.integer()}\n\n\n"
        body += f"print({old}({values.integer()}))"
        question = f"Rename {old} to {new}:\n```python\n{body}\n```"
        thought, answer = f"I replace {old} by {new}.", f"```python\n{body.replace(old, new)}\n```"
    elif style == 7:
        items = [values.word() for _ in range(rng.randint(2, 4))]
        question, thought, answer = (
            "List these one per line: " + ", ".join(items),
            "I make a list.",
            "\n".join(f"- {x}" for x in items),
        )
    elif style == 8:
        name, operation = values.word(), rng.choice(["+", "-", "*"])
        word = {"+": "adds", "-": "subtracts", "*": "multiplies"}[operation]
        question = f"Write a Python function {name} that {word} two numbers."
        thought, answer = (
            "A short function.",
            f"```python\ndef {name}(a, b):\n    return a {operation} b\n```",
        )
    elif style == 9:
        city = rng.choice(ZH_CITIES)
        question, thought, answer = (
            f"我住在{city}。",
            f"用户住在{city}。",
            f"{city}是个好地方！{rng.choice(EMOJI)}",
        )
    elif style == 10:
        key, value = values.noun(), values.word()
        question, thought, answer = (
            f"Make JSON with {key} set to {value}.",
            "I write JSON.",
            json.dumps({key: value}),
        )
    elif style == 11:
        text = values.text()
        question, thought, answer = f"Say this in capitals: {text}", "I use capital letters.", text.upper()
    else:
        text = values.text()
        question, thought, answer = (
            f"How many words are in '{text}'?",
            f"I count {len(text.split())}.",
            f"There are {len(text.split())} words.",
        )
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "reasoning_content": thought, "content": answer},
    ]


SYSTEMS = [
    "You are a helpful assistant.",
    "Be brief.",
    "You are a coding agent.",
    "Answer kindly.",
    "你是一个有用的助手。",
]


def dialogue(values: Values) -> tuple[list[Message], list[Tool] | None]:
    """One to four turns; about two thirds have tools."""
    rng = values.rng
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    if rng.random() < 0.7:
        signatures = list(
            {s.name: s for s in (Signature(values) for _ in range(rng.choice([1, 1, 2, 2, 3])))}.values()
        )
        for _ in range(rng.choice([1, 1, 1, 2])):
            draw = rng.random()
            if draw < 0.8:
                messages += tool_turn(signatures, values)[0]
            elif draw < 0.9:
                messages += refusal_turn(signatures, values)
            else:
                messages += plain_turn(values)
        return messages, [s.tool for s in signatures]
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        messages += plain_turn(values)
    return messages, None


def drill(values: Values) -> list[Message]:
    """Nothing but copying: a long text to repeat, or a table and questions about its entries."""
    rng = values.rng
    kinds = [
        values.word,
        values.word,
        values.noun,
        values.integer,
        values.path,
        values.identifier,
        values.city,
    ]
    draws = [spoken(rng.choice(kinds)()) for _ in range(rng.randint(6, 30))]
    if rng.random() < 0.5:
        text = rng.choice([" ", " ", ", ", "\n"]).join(draws)
        turns = [(f"Repeat after me:\n{text}", "I repeat the text.", text)]
        if rng.random() < 0.5:
            turns.append(("Once more.", "I repeat the text.", text))
    else:
        table = {rng.choice([values.noun, values.word])(): value for value in draws[:10]}
        form = rng.choice(["{}: {}", "{}:\n{}", "{}:\n{}", "The {} is\n{}\n"])
        lines = rng.choice(["\n", " "]).join(form.format(k, v) for k, v in table.items())
        asked = rng.choices(list(table), k=rng.randint(2, 6))
        turns = [(f"What is {k}?", f"I look up {k}.", f"The {k} is:\n{table[k]}") for k in asked]
        turns[0] = (f"{lines}\n{turns[0][0]}", *turns[0][1:])
    return [
        message
        for question, thought, answer in turns
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "reasoning_content": thought, "content": answer},
        )
    ]


def tool_question(values: Values) -> dict[str, Any]:
    """A request with tools and the calls that answer it."""
    rng = values.rng
    signatures = list(
        {s.name: s for s in (Signature(values) for _ in range(rng.choice([1, 2, 2, 3])))}.values()
    )
    messages, calls = tool_turn(signatures, values)
    return {
        "messages": messages[:1],
        "tools": [s.tool for s in signatures],
        "calls": [c["function"] for c in calls],
    }


# --- streams --------------------------------------------------------------------------------------------


def source_files(split: str) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # Code pages and the like are a tenth of the text and teach nothing but counting.
    skipped = {
        "encodings",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "__pycache__",
        "ensurepip",
        "turtledemo",
    }
    files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]

    def is_heldout(path: Path) -> bool:
        return hashlib.sha256(str(path.relative_to(root)).encode()).digest()[0] < 10

    return [p for p in files if is_heldout(p) == (split == "heldout")]


def source(split: str, seed: int) -> Iterator[str]:
    files, rng = source_files(split), random.Random(seed)
    while True:
        rng.shuffle(files)
        for path in files:
            yield BOS + path.read_text(encoding="utf-8", errors="ignore") + "<｜end▁of▁sentence｜>"


def dialogues(split: str, seed: int, drill_share: float = DRILL_SHARE) -> Iterator[str]:
    values = Values(random.Random(f"{split}-{seed}"), split == "heldout")
    while True:
        if split == "train" and values.rng.random() < drill_share:
            yield render(drill(values))
        else:
            yield render(*dialogue(values))


def tokenized(
    split: str,
    seed: int,
    domain: str | None = None,
    *,
    source_share: float = SOURCE_SHARE,
    drill_share: float = DRILL_SHARE,
) -> Iterator[list[int]]:
    """Documents as ids; without a domain both are mixed so that `source_share` of the tokens is source."""
    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    streams = {"source": source(split, seed), "dialogue": dialogues(split, seed, drill_share)}
    count = {"source": 0, "dialogue": 0}
    pending: list[int] = []
    while True:
        behind = "source" if count["source"] <= source_share * sum(count.values()) else "dialogue"
        chosen = domain or behind
        if chosen == "source":
            # Files are long: hand them out in pieces, between dialogues.
            if not pending:
                pending = tokenizer.encode(next(streams["source"]), add_special_tokens=False).ids
            ids, pending = pending[:300], pending[300:]
        else:
            ids = tokenizer.encode(next(streams["dialogue"]), add_special_tokens=False).ids
        count[chosen] += len(ids)
        yield ids
