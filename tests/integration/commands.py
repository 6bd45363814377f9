# SPDX-License-Identifier: Apache-2.0
"""Commands in processes of their own that do not import torch and anomalib anew, which takes seconds each.

One process imports what the stock `anomalib` command imports, and nothing else, and forks for each command. Run as a
program this is that process: it reads a command per line from its standard input, as JSON, and answers its exit status.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path


def run_command(command: list[str], cwd: Path, **environment: str) -> tuple[str, str]:
    """Run `anomalib ...`, `tensorboard ...` or `python ...` in a folder, which must succeed.

    Args:
        command: Words of the command.
        cwd: Folder to run in.
        environment: Variables besides those of this process; there is no GPU.

    Returns:
        What it wrote to standard output and to standard error.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("out", "error")]
        request = {
            "command": command,
            "cwd": str(cwd),
            "environment": {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
            "outputs": [str(path) for path in outputs],
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = server.stdout.readline().strip()
        assert status, "the process that forks has ended"
        out, error = (path.read_text(errors="replace") for path in outputs)
    assert status == "0", f"{command}: {(out + error)[-4000:]}"
    return out, error


@cache
def _server() -> subprocess.Popen:
    command = [sys.executable, __file__]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # closes its input, at which it ends
    return server


def _serve() -> None:
    import anomalib.cli
    import anomalib.engine  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(request: dict) -> None:
    """Do in this process what a fresh one would do."""
    for path, descriptors in zip((os.devnull, *request["outputs"]), (0, 1, 2), strict=True):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptors)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    program, *arguments = request["command"]
    try:
        if program != "python":
            (script,) = entry_points(group="console_scripts", name=program)
            sys.argv, sys.path[0] = [program, *arguments], str(Path(sys.executable).parent)
            sys.exit(script.load()())
        elif arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], request["cwd"]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    _serve()
