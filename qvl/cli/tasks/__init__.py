"""The commands of `qvl.tasks`: one file each. `flags` are what they share, `perform` does the work."""
