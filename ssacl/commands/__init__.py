"""The subcommands of `ssacl`, one module each; `add_parsers(commands)` hangs them into the tree."""
