"""Write the held-out questions and dialogues that tests and benchmarks use to tests/data.

python -m tools.nano.heldout
"""

import json
import random
from pathlib import Path

from tools.nano import data

DATA = Path(__file__).parents[2] / "tests" / "data"
NUM_QUESTIONS, NUM_DIALOGUES = 50, 40


def main() -> None:
    values = data.Values(random.Random("questions"), heldout=True)
    questions = [data.tool_question(values) for _ in range(NUM_QUESTIONS)]
    _write(DATA / "tool_questions.jsonl", questions)
    values = data.Values(random.Random("dialogues"), heldout=True)
    dialogues = [data.dialogue(values) for _ in range(NUM_DIALOGUES)]
    _write(DATA / "heldout_dialogues.jsonl", [{"messages": m, "tools": t} for m, t in dialogues])


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} rows in {path}")


if __name__ == "__main__":
    main()
