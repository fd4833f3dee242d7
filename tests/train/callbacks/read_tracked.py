"""What a tracker has kept of a run, read by the tracker's own library; prints {figure: {step: value}} as JSON.

    python read_tracked.py tensorboard|trackio|wandb FOLDER

In a process of its own: these libraries start threads, and warn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Figures = dict[str, dict[int, Any]]
BLOCK = 32_768


def tensorboard(folder: Path) -> Figures:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    figures: Figures = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    if "sample/text_summary" in events.Tags()["tensors"]:
        written = events.Tensors("sample/text_summary")
        figures["sample"] = {e.step: e.tensor_proto.string_val[0].decode() for e in written}
    return figures


def trackio(folder: Path) -> Figures:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("protomamba")
    rows = SQLiteStorage.get_logs("protomamba", run)
    return gathered([row for row in rows if any("/" in name or name == "sample" for name in row)])


def gathered(rows: list[dict[str, Any]]) -> Figures:
    found: Figures = {}
    for row in rows:
        step = int(row.get("step", row.get("_step", -1)))
        for name, value in row.items():
            if "/" in name or name == "sample":
                found.setdefault(name, {})[step] = value
    return found


def wandb(folder: Path) -> Figures:
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return gathered(rows)


def records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format behind a header of 7 bytes: crc, length and kind (whole, first, middle, last) a piece."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole = (b"" if kind in (1, 2) else whole) + data[place + 7 : place + 7 + length]
        if kind in (1, 4):
            yield whole
        place += 7 + length


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
