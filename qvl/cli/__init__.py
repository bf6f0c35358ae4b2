"""The `qvl` command: a file for each command beside what they share; `app` names them all."""
