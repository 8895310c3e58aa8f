"""The labs of the course. Start with labs/README.md."""
