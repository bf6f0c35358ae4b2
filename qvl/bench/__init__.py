"""Measurements of the engine without a server: what `qvl bench` runs. Knows engines and clocks, not HTTP."""
