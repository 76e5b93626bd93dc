"""What is fast, exact and small, with the programs that show it."""
