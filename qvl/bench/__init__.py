"""Measurements: what `qvl bench` runs. Beside `load`, which drives a server, nothing here knows HTTP."""
