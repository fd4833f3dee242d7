"""One fuzzer over every reader of files: see readers.py for the registry and __main__.py for a run in full."""
