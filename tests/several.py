"""offload_trainer/run.py several times in one process: a start costs more than a tiny run.

torchrun --nproc_per_node 2 -m tests.several ARGUMENTS OF THE FIRST -- ARGUMENTS OF THE SECOND
"""

import runpy
import sys
from itertools import groupby

from tests.runs import ROOT

if __name__ == "__main__":
    program = ROOT / "offload_trainer" / "run.py"
    sys.path[0] = str(program.parent)  # as for a script
    for between, arguments in groupby(sys.argv[1:], "--".__eq__):
        if not between:
            sys.argv = [str(program), *arguments]
            try:
                runpy.run_path(str(program), run_name="__main__")
            except SystemExit as end:
                print(f"exit code {end.code}", flush=True)
