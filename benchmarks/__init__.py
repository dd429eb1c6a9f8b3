"""Side-by-side measurements; each file is a command that prints a table."""
