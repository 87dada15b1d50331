"""What tools/bench.py measures, one benchmark a file."""
