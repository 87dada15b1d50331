"""Start the trainer as a user does, in a process of its own."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.comparison import environment
from offload_trainer.errors import UserError

RUN = (Path(__file__).parents[2] / "offload_trainer" / "run.py",)


def launch(what: str, arguments: Sequence[object], program: Sequence[object] = RUN) -> None:
    """`accelerate launch` the program. Raises `UserError`, with `what` it was and why, if it fails."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *program, *arguments]
    done = subprocess.run([str(word) for word in command], env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{what}: {reason(done.stderr)}")


def reason(said: str) -> str:
    """The trainer's own word on why it failed; else the last one there is, but not of the launcher's traceback."""
    words = [line for line in said.splitlines() if line.strip() and not line.startswith(" ")]
    own = [line for line in words if line.startswith("error")]
    others = [line for line in words if "CalledProcessError" not in line]
    return (own or others[::-1] or ["failed"])[0]
