"""Load against a server: what `qvl bench serve` runs. Knows HTTP and clocks. Knows no engine, loads no torch."""
