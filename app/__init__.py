"""A blog that people write by mail."""
