"""What every strategy is measured on, one per file, found by name; there is no list to keep. See benchmarks/case.py."""
