"""The model's pieces, one idea a file, each declaration beside its function."""
