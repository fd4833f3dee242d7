"""What a link costs a run on many nodes, by arithmetic from measured figures: two tables of docs/scale-out.md.

    python studies/links.py                                   # a second
    python studies/links.py --tokens-per-s 2400 --tokens 2048 # of another machine, with more rows a rank

Measured, and given here: tokens a second of one rank, and the rows of embedding and prototypes that a rank's step
touches (`protomamba bench --sections ranks` shows both: its `sent_mib` at two ranks is what this comes to at two).
Nothing is taken to overlap, and no message to have a latency of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import write_between_marks

from protomamba.bench.shapes import NAMED
from protomamba.model.sequence_model import SequenceModel

COMMAND = "python studies/links.py"
NODES, LINKS_GBIT, EVERY = (2, 10, 100, 1_000), (0.1, 1.0, 10.0), (50, 200)
BYTES = 4


def sizes(name: str) -> tuple[int, int, int]:
    """Parameters of a body, those of its tall tables among them, and the tables' width."""
    config = NAMED[name].config()
    model = SequenceModel(config, seed=0)
    tall = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p.shape[0] > 4 * p.shape[1])
    return model.parameter_count(), tall, config.d_model


def sent(nodes: int, parameters: int, tall: int, filled: int, every: int | None) -> float:
    """Bytes a rank sends a step: gradients and weights where all share it, else a meeting's over its steps."""
    share = (nodes - 1) / nodes
    if every is None:
        return share * BYTES * (parameters - tall + filled + parameters)
    return share * BYTES * 2 * parameters / every


def table(given: argparse.Namespace) -> str:
    """Bytes, and at each link the share of the time that is computing."""
    parameters, tall, width = sizes(given.body)
    filled, step_s = given.rows * width, given.tokens / given.tokens_per_s
    rows = ["| nodes | steps between meetings | sent by a rank a step |"]
    rows[0] += "".join(f" at {gbit:g} Gbit/s |" for gbit in LINKS_GBIT)
    rows.append("|---" * (3 + len(LINKS_GBIT)) + "|")
    for every in (None, *EVERY):
        for nodes in NODES:
            size = sent(nodes, parameters, tall, filled, every)
            link_s = [size * 8 / (gbit * 1e9) for gbit in LINKS_GBIT]
            cells = [f" {s:.3g} s, {step_s / (step_s + s):.0%} |" for s in link_s]
            rows.append(f"| {nodes:,} | {every or 'every step is shared'} | {size / 1e6:,.1f} MB |{''.join(cells)}")
    about = (
        f"Body {given.body}: {parameters:,} parameters, {tall:,} of them in tables of which a step touches "
        f"{given.rows:,} rows; {given.tokens:,} tokens a rank and step at {given.tokens_per_s:,} tokens/s. Beside each "
        "link: the seconds it takes, and the share of the time that is left for computing."
    )
    return about + "\n\n" + "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs-dir", type=Path, default=Path("docs"), help="[%(default)s]")
    parser.add_argument("--body", default="M", help="of the benchmark [%(default)s]")
    parser.add_argument("--tokens", type=int, default=512, help="of a rank in one step [%(default)s]")
    parser.add_argument("--tokens-per-s", type=int, default=1_200, help="of a rank [%(default)s]")
    parser.add_argument(
        "--rows", type=int, default=1_450, help="of the tables that a rank's step touches [%(default)s]"
    )
    given = parser.parse_args()
    text = table(given)
    write_between_marks(given.docs_dir / "scale-out.md", COMMAND, text)
    print(text)


if __name__ == "__main__":
    main()
