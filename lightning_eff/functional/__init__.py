"""The methods as plain functions: tensors and plain state in, tensors and state out."""
