"""Starts replicas in a blink: a process that has imported everything, and forks on request.

Speaks lines of JSON: it reads {"start": settings} and {"stop": pid}, and writes {"pid": ..., "replica": ...} and
{"pid": ..., "exit": status}. When its input ends, it ends all its replicas and itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1


def main() -> None:
    os.environ.setdefault("RUST_LOG", "error")
    import torch

    torch.set_num_threads(1)
    from tests.strategies.fault_tolerant import replica_main

    children: set[int] = set()
    print(json.dumps({"ready": True}), flush=True)
    pending = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.02)
        if readable:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                if "start" in request:
                    pid = fork(replica_main.main, request["start"])
                    children.add(pid)
                    print(json.dumps({"pid": pid, "key": request["key"]}), flush=True)
                elif request["stop"] in children:
                    end(request["stop"])
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.discard(pid)
                print(json.dumps({"pid": pid, "exit": os.waitstatus_to_exitcode(status)}), flush=True)
    for pid in children:
        end(pid)


def fork(function: Any, settings: dict[str, Any]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()  # its workers are found by this session
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(settings["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(settings["environment"])
        function(settings)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
