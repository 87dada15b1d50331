"""The command: `accelerate launch offload_trainer/run.py --config FILE [--dotted.key value …] [--dry-run]`."""

import os
import signal
import sys

from offload_trainer.config import parse
from offload_trainer.errors import UserError
from offload_trainer.train import train

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 2 after one line that says what to mend; 1 if another process is gone; 130 after an interrupt."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill leaves what Ctrl-C leaves
    try:
        train(parse(argv))
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}" if rank == "0" else f"error (rank {rank}): {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error) and "Connection reset by peer" not in str(error):
            raise
        print("error: another process of this run has ended (see what it said)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    code = main()
    for number in (signal.SIGINT, signal.SIGTERM) if code == INTERRUPTED else ():
        signal.signal(number, signal.SIG_IGN)  # one more would only disturb the end
    if code == INTERRUPTED:
        sys.stderr.write("interrupted\n")  # at once: several processes write there
    sys.exit(code)
