"""The bundled model calls strict tools with arguments that fit, also when it speculates."""

import json
import re
from pathlib import Path
from typing import Any

from mlx_step35.chat.grammar import GrammarCompiler
from mlx_step35.chat.output import parse_output
from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import load_checkpoint, resolve_model
from mlx_step35.decoding import DecodeOptions, decode
from mlx_step35.sampling import SamplingParams

QUESTIONS = Path(__file__).parent / "data" / "tool_questions.jsonl"
NUM_QUESTIONS = 3


def strict(tool: Any) -> Any:
    """The tool with a demand that a model does not meet by chance."""
    function = tool["function"]
    parameters = function["parameters"]
    properties = {**parameters["properties"], "reason": {"type": "string", "pattern": "^[xyz]{2,9}$"}}
    required = [*parameters.get("required", ()), "reason"]
    schema = {**parameters, "properties": properties, "required": required}
    return {**tool, "function": {**function, "parameters": schema, "strict": True}}


def test_calls_fit_and_do_not_depend_on_drafts() -> None:
    directory = resolve_model("nano")
    model, tokenizer = load_checkpoint(directory, "float32"), Tokenizer.from_directory(directory)
    template, compiler = ChatTemplate.from_directory(directory), GrammarCompiler(tokenizer)
    num_calls = 0
    for line in QUESTIONS.read_text().splitlines()[:NUM_QUESTIONS]:
        question = json.loads(line)
        tools = [strict(tool) for tool in question["tools"]]
        ids = tokenizer.encode_rendered(template.render(question["messages"], question["tools"]))
        texts = []
        for mtp in ("off", 3):
            options, constraint = DecodeOptions(150, mtp), compiler.constraint(tools=tools)
            stream = decode(model, ids, model.make_cache(), SamplingParams(), options, constraint=constraint)
            texts.append(tokenizer.decode([one.token for one in stream]))
        assert texts[0] == texts[1]
        known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        for call in parse_output(texts[0].partition("<|im_end|>")[0], tools).tool_calls:
            arguments = json.loads(call.arguments)
            assert set(known[call.name]["required"]) <= set(arguments) <= set(known[call.name]["properties"])
            assert re.fullmatch("[xyz]{2,9}", arguments["reason"])
            num_calls += 1
    assert num_calls > 0
