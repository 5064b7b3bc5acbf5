"""The model's own turns, token for token, when a client sends them back.

Clients change whitespace, the order of arguments and the spelling of JSON, and many drop the thinking; the
template has one spelling of its own. The rendered turn then differs from what was sampled, and nothing behind
it can be reused. So the sampled ids are remembered by the meaning of the turn, and used where it stands again
behind exactly the prompt it answered: there they are what the model said, not a guess. Anywhere else, or with
another meaning, the template's rendering is used.
"""

import hashlib
import json
import re
import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_step35.chat.messages import Message, normalize_messages
from mlx_step35.chat.output import ParsedOutput
from mlx_step35.chat.template import ChatTemplate, Rendered
from mlx_step35.chat.tokenizer import Tokenizer

# Some ten thousand answers of coding agents.
LIMIT_BYTES = 16_000_000
# What an answer takes beside its tokens and the ids of its calls: digests, and its places in two tables.
TURN_BYTES = 1_000
CALL_BYTES = 150

END_THINK = "</think>"
# A prompt that ends like this has its thinking block behind it.
_CLOSED_TAIL = 6


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer: what was sampled behind the prompt with this digest, without the token that ends it."""

    prompt: bytes
    # As bytes: a tuple of numbers takes nine times as much.
    tokens: bytes
    # A digest of the thinking, which may be longer than the rest.
    reasoning: bytes
    call_ids: frozenset[str]
    # Whether the prompt had closed the thinking block already.
    is_closed: bool

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        return TURN_BYTES + len(self.tokens) + CALL_BYTES * len(self.call_ids)


class TurnMemory:
    """Answers by their meaning, the newest ones; may be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, limit_bytes: int = LIMIT_BYTES) -> None:
        self.num_replayed = 0
        self.nbytes = 0
        self._tokenizer = tokenizer
        self._template = template
        self._limit_bytes = limit_bytes
        self._turns: OrderedDict[tuple[bytes, bytes], Turn] = OrderedDict()
        self._by_meaning: dict[bytes, dict[bytes, Turn]] = {}
        self._lock = threading.Lock()

    def remember(self, prompt: Sequence[int], tokens: Sequence[int], answer: ParsedOutput) -> None:
        """Keep what was sampled behind a prompt; `answer` is how the client saw it.

        A turn whose end the client did not see is not kept: nothing it could echo has that meaning.
        """
        end_ids = set(self._tokenizer.eos_token_ids)
        kept = tokens[:-1] if tokens and tokens[-1] in end_ids else tokens
        if answer.unfinished or not kept:
            return
        end_think = self._tokenizer.token_id(END_THINK)
        turn = Turn(
            _digest(prompt).digest(),
            _bytes(kept),
            _thinking(answer.reasoning or ""),
            frozenset(call.id for call in answer.tool_calls),
            end_think is not None and end_think in list(prompt[-_CLOSED_TAIL:]),
        )
        calls = [(call.name, json.loads(call.arguments or "{}")) for call in answer.tool_calls]
        self._keep(_meaning(answer.content or "", calls), turn)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], Rendered]:
        """Ids of a conversation with own turns replayed, and its plain rendering.

        Raises RequestError as `ChatTemplate.render` does.
        """
        normalized = normalize_messages(messages)
        found = self._candidates(normalized)
        rendered = self._template.render(normalized, tools, add_generation_prompt, variables)
        while found:
            marks = _Marks(found)
            marked = self._template.render(marks.apply(normalized), tools, add_generation_prompt, variables)
            ids, failed = self._splice(marked, marks)
            if failed is None:
                self.num_replayed += len(found)
                return ids, rendered
            # Behind a turn that stands elsewhere now, all others do too.
            found = {index: turns for index, turns in found.items() if index < failed}
        return self._tokenizer.encode_rendered(rendered), rendered

    def _candidates(self, messages: Sequence[Message]) -> dict[int, list[Turn]]:
        """Turns of the same meaning, for the messages behind the last query, whose thinking is shown."""
        first = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        found: dict[int, list[Turn]] = {}
        for index in range(first + 1, len(messages)):
            message = messages[index]
            if message["role"] == "assistant" and (turns := self._turns_like(message)):
                found[index] = turns
        return found

    def _turns_like(self, message: Message) -> list[Turn]:
        """Turns with a message's content and calls, best first; another thinking is another meaning."""
        calls = message.get("tool_calls", ())
        functions = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        ids = {call["id"] for call in calls}
        shown = message["reasoning_content"].strip()
        reasoning = _thinking(shown)
        with self._lock:
            turns = list(self._by_meaning.get(_meaning(message["content"], functions), {}).values())
        same = [turn for turn in turns[::-1] if not shown or reasoning == turn.reasoning]
        return sorted(same, key=lambda turn: not turn.call_ids & ids)

    def _splice(self, marked: Rendered, marks: "_Marks") -> tuple[list[int], int | None]:
        """Ids of a marked rendering, or the index of the first message that is not where it was."""
        ids: list[int] = []
        digest = _digest(())
        inside: int | None = None
        seen: set[int] = set()
        for segment in marked.segments:
            for text, index, is_last in marks.split(segment.text):
                if text and inside is None:
                    new = (
                        self._tokenizer.encode_text(text)
                        if segment.is_plain
                        else self._tokenizer.encode(text)
                    )
                    digest.update(_bytes(new))
                    ids += new
                if index is None:
                    continue
                if inside is None:
                    turn = next((t for t in marks.turns[index] if t.prompt == digest.digest()), None)
                    if turn is None:
                        return [], index
                    digest.update(turn.tokens)
                    ids += _tokens(turn.tokens)
                    seen.add(index)
                inside = None if is_last else index
        missing = [index for index in marks.turns if index not in seen]
        return ids, min(missing, default=None)

    def _keep(self, meaning: bytes, turn: Turn) -> None:
        if turn.nbytes > self._limit_bytes:
            return
        with self._lock:
            self._forget((meaning, turn.prompt))
            self._turns[meaning, turn.prompt] = turn
            self._by_meaning.setdefault(meaning, {})[turn.prompt] = turn
            self.nbytes += turn.nbytes
            while self.nbytes > self._limit_bytes:
                self._forget(next(iter(self._turns)))

    def _forget(self, key: tuple[bytes, bytes]) -> None:
        """Drop a turn if there is one; the lock must be held."""
        turn = self._turns.pop(key, None)
        if turn is None:
            return
        meaning, prompt = key
        self.nbytes -= turn.nbytes
        del self._by_meaning[meaning][prompt]
        if not self._by_meaning[meaning]:
            del self._by_meaning[meaning]


class _Marks:
    """Stand-ins for the thinking and the content of replayed messages, to find their places when rendered."""

    def __init__(self, found: Mapping[int, Sequence[Turn]]) -> None:
        # All must stand behind the same kind of prompt; the best one decides.
        self.turns = {
            index: [turn for turn in turns if turn.is_closed == turns[0].is_closed]
            for index, turns in found.items()
        }
        # No text holds a random number by chance, and no user can know it.
        self._nonce = secrets.token_hex(16)
        self._pattern = re.compile(rf"\[{self._nonce}:(\d+):([rc])\]")

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with marks in place of what will be replayed."""
        marked = list(messages)
        for index, turns in self.turns.items():
            reasoning = "" if turns[0].is_closed else self._mark(index, "r")
            marked[index] = {
                "role": "assistant",
                "content": self._mark(index, "c"),
                "reasoning_content": reasoning,
            }
        return marked

    def split(self, text: str) -> Iterator[tuple[str, int | None, bool]]:
        """Stretches of text, each with the message whose mark follows and whether that is its last one."""
        position = 0
        for match in self._pattern.finditer(text):
            yield text[position : match.start()], int(match[1]), match[2] == "c"
            position = match.end()
        yield text[position:], None, False

    def _mark(self, index: int, kind: str) -> str:
        return f"[{self._nonce}:{index}:{kind}]"


def _meaning(content: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> bytes:
    """A digest that spelling does not change: whitespace of the content, order and numbers in arguments."""
    value = [_squeezed(content), [[name, _plain(arguments)] for name, arguments in calls]]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


def _plain(value: Any) -> Any:
    """A JSON value with one form for each number: clients in JavaScript write 1.0 as 1."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _thinking(text: str) -> bytes:
    """A digest of thinking that whitespace does not change."""
    return hashlib.sha256(_squeezed(text).encode("utf-8", "surrogatepass")).digest()


def _digest(tokens: Sequence[int]) -> "hashlib._Hash":
    return hashlib.sha256(_bytes(tokens))


def _bytes(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def _tokens(data: bytes) -> list[int]:
    return array("i", data).tolist()
