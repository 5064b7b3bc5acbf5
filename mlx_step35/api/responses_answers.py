"""Answers of the Responses API, whole and streamed."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_step35.api.failures import Failure
from mlx_step35.api.sse import event
from mlx_step35.api.types import ChatRequest, Choice, Identity, TokenLogprob, Usage
from mlx_step35.chat.output import (
    ContentDelta,
    Delta,
    ParsedOutput,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)


def response(identity: Identity, request: ChatRequest, choice: Choice, usage: Usage) -> Mapping[str, Any]:
    """A whole answer, put together by the writer of streamed ones."""
    writer = ResponseWriter(identity, request)
    writer.write(0, _deltas(choice.output), ())
    writer.finish(0, choice)
    writer.close(usage)
    return writer.response


class ResponseWriter:
    """Streams a response: items one after the other, each announced, filled and done."""

    # response.failed says enough.
    must_break_off = False

    def __init__(self, identity: Identity, request: ChatRequest) -> None:
        self.response: dict[str, Any] = _response(identity, request)
        self._suffix = identity.id.removeprefix("resp_")
        self._sequence = 0
        self._item: dict[str, Any] | None = None

    def start(self, usage: Usage) -> bytes:
        return self._event("response.created", response=self.response) + self.keepalive()

    def keepalive(self) -> bytes:
        return self._event("response.in_progress", response=self.response)

    def write(self, index: int, deltas: Sequence[Delta], logprobs: Sequence[TokenLogprob]) -> bytes:
        return b"".join(self._write(delta) for delta in deltas)

    def finish(self, index: int, choice: Choice) -> bytes:
        # A response without any item is more than clients expect.
        begin = b"" if self.response["output"] else self._enter("message")
        is_cut = choice.finish_reason == "length"
        done = begin + self._end_item("incomplete" if is_cut else "completed")
        if is_cut:
            self.response["status"] = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["status"] = "completed"
        return done

    def close(self, usage: Usage) -> bytes:
        self.response["usage"] = _usage(usage)
        return self._event(f"response.{self.response['status']}", response=self.response)

    def fail(self, failure: Failure, request_id: str) -> bytes:
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": failure.message}
        return self._event("response.failed", response=self.response)

    def _write(self, delta: Delta) -> bytes:
        match delta:
            case ReasoningDelta(text):
                return self._enter("reasoning") + self._think(text)
            case ContentDelta(text):
                return self._enter("message") + self._say(text)
            case ToolCallStart(_, call_id, name):
                item = {"call_id": call_id, "name": name, "arguments": ""}
                return self._end_item() + self._begin_item("function_call", item)
            case ToolCallArguments(_, text):
                assert self._item is not None
                self._item["arguments"] += text
                return self._item_event("response.function_call_arguments.delta", delta=text)

    def _enter(self, kind: str) -> bytes:
        """Begin an item unless one of its kind is open."""
        if self._item is not None and self._item["type"] == kind:
            return b""
        begin = self._end_item()
        if kind == "reasoning":
            summary = {"type": "summary_text", "text": ""}
            item = {"summary": [summary], "content": [], "encrypted_content": None}
            begin += self._begin_item(kind, item, summary=[])
            return begin + self._item_event(
                "response.reasoning_summary_part.added", summary_index=0, part=summary
            )
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        begin += self._begin_item(kind, {"role": "assistant", "content": [part]}, content=[])
        return begin + self._item_event("response.content_part.added", content_index=0, part=part)

    def _begin_item(self, kind: str, values: dict[str, Any], **announced: Any) -> bytes:
        """Open an item; it is announced as it is but for the values in `announced`."""
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item_id = f"{prefix}_{self._suffix}_{len(self.response['output'])}"
        self._item = {"id": item_id, "type": kind, "status": "in_progress", **values}
        self.response["output"].append(self._item)
        return self._event(
            "response.output_item.added",
            output_index=len(self.response["output"]) - 1,
            item={**self._item, **announced},
        )

    def _think(self, text: str) -> bytes:
        assert self._item is not None
        self._item["summary"][0]["text"] += text
        return self._item_event("response.reasoning_summary_text.delta", summary_index=0, delta=text)

    def _say(self, text: str) -> bytes:
        assert self._item is not None
        self._item["content"][0]["text"] += text
        return self._item_event("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def _end_item(self, status: str = "completed") -> bytes:
        item = self._item
        if item is None:
            return b""
        # A call is not announced before it is whole.
        item["status"] = "completed" if item["type"] == "function_call" else status
        if item["type"] == "reasoning":
            part = item["summary"][0]
            end = self._item_event(
                "response.reasoning_summary_text.done", summary_index=0, text=part["text"]
            ) + self._item_event("response.reasoning_summary_part.done", summary_index=0, part=part)
        elif item["type"] == "message":
            part = item["content"][0]
            end = self._item_event(
                "response.output_text.done", content_index=0, text=part["text"], logprobs=[]
            ) + self._item_event("response.content_part.done", content_index=0, part=part)
        else:
            end = self._item_event(
                "response.function_call_arguments.done", name=item["name"], arguments=item["arguments"]
            )
        done = self._event(
            "response.output_item.done", output_index=len(self.response["output"]) - 1, item=item
        )
        self._item = None
        return end + done

    def _item_event(self, event_name: str, /, **values: Any) -> bytes:
        assert self._item is not None
        output_index = len(self.response["output"]) - 1
        return self._event(event_name, item_id=self._item["id"], output_index=output_index, **values)

    def _event(self, event_name: str, /, **values: Any) -> bytes:
        data = {"type": event_name, "sequence_number": self._sequence, **values}
        self._sequence += 1
        return event(data, event_name)


def _response(identity: Identity, request: ChatRequest) -> dict[str, Any]:
    """A response at its start; what was asked for is repeated in it."""
    sampling = request.sampling
    choice = request.tool_choice
    named = {"type": "function", "name": choice.name}
    return {
        "id": identity.id,
        "object": "response",
        "created_at": identity.created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "max_output_tokens": request.max_tokens,
        "model": identity.model,
        "output": [],
        "parallel_tool_calls": request.has_parallel_calls,
        "previous_response_id": None,
        "store": False,
        "temperature": sampling.temperature,
        "tool_choice": named if choice.mode == "named" else choice.mode,
        "tools": [_named(tool) for tool in request.tools],
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        **request.repeated,
    }


def _named(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool by its name: agents send 40 KB of schemas, and the response is in every heartbeat."""
    return {"type": "function", "name": tool["function"]["name"], "parameters": None, "strict": None}


def _usage(usage: Usage) -> dict[str, Any]:
    extension = {} if usage.speculation is None else {"step35": dict(usage.speculation)}
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
        **extension,
    }


def _deltas(output: ParsedOutput) -> list[Delta]:
    """A finished answer as if it had been streamed."""
    deltas: list[Delta] = []
    if output.reasoning:
        deltas.append(ReasoningDelta(output.reasoning))
    if output.content:
        deltas.append(ContentDelta(output.content))
    for index, call in enumerate(output.tool_calls):
        deltas += [ToolCallStart(index, call.id, call.name), ToolCallArguments(index, call.arguments)]
    return deltas
