"""Does a subnetwork beat a small dense network at equal device memory and time? `python tools/frontier.py --help`."""

import sys

from reproduce import main

if __name__ == "__main__":
    sys.exit(main(["frontier", *sys.argv[1:]]))
