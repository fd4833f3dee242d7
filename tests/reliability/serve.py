"""The fork server of `forked.py`: one request a line on standard input, one answer a line on standard output.

Before the first fork it trains once: torch imports half of itself when the first optimizer is made. A child ends with
what the interpreter does for threads and at-exit functions, but leaves the taking apart of all modules to the system.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NoReturn

from protomamba.cli.main import main
from tests.reliability.forked import Plan
from tests.reliability.hooks import install
from tests.runs import token_file, train

STOPS = (signal.SIGINT, signal.SIGTERM)


def serve() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        if "argv" in request:
            # A child of Python forgets what is sent to it before it is on its feet: until then, signals wait.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            pid = os.fork()
            if pid == 0:
                end(become(request))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            answer = {"pid": pid}
        elif "wait" in request:
            answer = {"status": os.waitpid(request["wait"], 0)[1]}
        else:
            answer = {"threads": len(os.listdir("/proc/self/task"))}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def become(request: dict[str, Any]) -> int:
    """Be the command line: in a process group of its own, output to a file, no inherited input."""
    os.setpgid(0, 0)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(output)
    os.close(null)
    # A shell's background job inherits that SIGINT is ignored; a run in the foreground does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    install(Plan(**request["plan"]))
    return main(request["argv"])


def end(code: int) -> NoReturn:
    """Leave the process as the interpreter would, but for its own dismantling."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def warm_up() -> None:
    """Load all that a run loads, silently."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        console, sys.stdout = sys.stdout, nowhere
        try:
            train(Path(folder, "run"), token_file(Path(folder)), "--steps", 4)
        finally:
            sys.stdout = console


if __name__ == "__main__":
    warm_up()
    serve()
