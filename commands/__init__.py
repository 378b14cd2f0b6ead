"""Commands: thin doors to functions that a script can call."""
