"""One atomic, checksummed file for all of a run; the run folder and its lock."""
