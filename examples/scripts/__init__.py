"""Runs without a command line: each file is one, with a function `main` that tests call with a small limit."""
