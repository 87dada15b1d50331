"""What the paper measured, measured again: see tools/reproduce.py."""
