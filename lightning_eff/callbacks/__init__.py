"""The methods as Lightning callbacks."""
