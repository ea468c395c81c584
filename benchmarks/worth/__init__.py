"""Where the methods pay: the situations that each of them is for, beside its rivals."""
