"""The compressors: what each of them sends in place of a gradient."""
