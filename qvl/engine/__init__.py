"""The engine: requests to tokens, synchronous. docs/structure.md says in which order its files are best read."""
