"""Every public constructor and function, called with values that its annotations forbid, or that are out of range."""
