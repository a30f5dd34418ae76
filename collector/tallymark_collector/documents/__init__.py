"""Files that people write in YAML, and what is wrong with them: all at once, each with its line and its field."""
