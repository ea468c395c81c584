"""Scripts and YAML to copy from; run them from the root of the repository with `python -m examples.<name>.train`."""
