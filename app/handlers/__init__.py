"""State functions: what happens with a message."""
