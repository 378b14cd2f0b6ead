"""The `ilvr` command: thin doors to functions that a script can call as well."""
