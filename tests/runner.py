"""Starts runs of train.py as processes of their own, cheaply: this one imports all and forks.

Reads lines {"cwd": .., "arguments": [..]} from standard input. For each it forks a process that
calls train.main there, answers "<pid>", and when that process has ended "<status>" (negative: the
signal that killed it). What the run prints goes to <cwd>/output.

Forking is safe because no thread has been started and no tensor computed before it.
"""

import json
import os
import sys

import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import train
from engine import keeper

keeper.SAVE_SECONDS = 0  # a checkpoint after every step
keeper.SAVE_RATIO = 0
os.fsync = int  # a kill, unlike a power failure, loses nothing that was written
train.VALIDATION_QUESTIONS = 4
train.RERANK_CANDIDATES = 2

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(job["cwd"])
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        try:
            status = train.main(job["arguments"])
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
