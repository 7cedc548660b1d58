"""The command line: one command per file, no logic of its own. Torch is imported when a command needs it."""
