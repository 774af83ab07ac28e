"""Attacks on what a run promises: few of each in `make test`, all of them in `make test-faults` (docs/reliability.md)."""
