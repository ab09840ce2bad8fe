"""The query strategies, one per file. strategy.load() finds them; there is no list to keep."""
