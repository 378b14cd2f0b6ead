"""The `ilvr` command: thin doors to functions that a script can call as well.

`main` and `arguments` import nothing but the standard library, and this package lies beside `ilvr`, whose import takes
seconds: so `--help` is quick. The module of a command is imported once its arguments are right.
"""
