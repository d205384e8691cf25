"""Speed, memory and quality, measured: each script prints a table. The last measured ones are in README.md here."""
