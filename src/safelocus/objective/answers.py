"""The answers that scores rest on, as they come and when all are there."""

import json
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safelocus import distributed
from safelocus.run.files import sealed, unsealed, write_text


class AnswerLog:
    """Keeps every answer and its score in a JSON-lines file; never printed.

    Unfinished, the file has a line for each batch of this process, as they come; `finish` makes one for each answer, of
    all processes, in the order of a single one. A batch that a resumed run repeats counts once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._batches = path.with_name(f"{path.name}.unfinished")

    def __call__(self, prompts: Any, responses: Any, scores: Any) -> None:
        rows = [
            {
                "prompt": prompt,
                **({"system": system} if (system := getattr(prompt, "system", None)) else {}),
                "response": response.text,
                "finished": response.finished,
                **({"thought": response.thought} if response.thought is not None else {}),
                **({"in_thought": True} if response.in_thought else {}),
                "safety": value,
            }
            for prompt, response, value in zip(prompts, responses, scores.tolist(), strict=True)
        ]
        with self._batches.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(sealed(rows))}")  # begins a line: another may have been cut off

    def finish(self) -> int:
        """Write the answers of all processes; every one of them calls this.

        Returns:
            How many are none, because their thought did not end.
        """
        batches: dict[Any, list[dict[str, Any]]] = {}
        for line in self._batches.read_bytes().split(b"\n") if self._batches.is_file() else ():
            with suppress(json.JSONDecodeError, UnicodeDecodeError):  # cut off by a crash: the batch was repeated
                json.loads(line)
                rows = unsealed(line, self._batches)
                batches[tuple((row["prompt"], row.get("system")) for row in rows)] = rows
        self._batches.unlink(missing_ok=True)
        rounds = zip_longest(*distributed.gather_objects(list(batches.values())), fillvalue=[])
        answers = [row for each in rounds for rows in each for row in rows]
        if distributed.is_main() and answers:
            write_text(self._path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))
        return sum(row.get("in_thought", False) for row in answers)
