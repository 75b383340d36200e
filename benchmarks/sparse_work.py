"""The folder of a run of sparse.py: results that are there already, and dense logits."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


class Work:
    """Results, a line of JSON each, and logits of the dense model, by the name of a place."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.results = folder, folder / "results.jsonl"
        text = self.results.read_text(encoding="utf-8") if self.results.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the last line was cut where the run was stopped
            self.results.write_text(whole, encoding="utf-8")
        self.rows = [json.loads(line) for line in whole.splitlines()]
        self.done = {row["id"] for row in self.rows}

    def add(self, **row: Any) -> None:
        """A result, at once on the disk."""
        self.rows.append(row)
        self.done.add(row["id"])
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def distance(self, name: str, given: Tensor, *, dense: bool) -> float:
        """The mean KL(dense || given) of rows [N,vocabulary]; dense ones are kept."""
        file = self.folder / f"logits-{name}.safetensors"
        if dense:
            save_file({"logits": given.contiguous()}, file)
            return 0.0
        expected = load_file(file)["logits"].float().log_softmax(-1)
        return float((expected.exp() * (expected - given.float().log_softmax(-1))).sum(-1).mean())
