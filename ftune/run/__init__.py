"""The stories: what each command does, in order."""
