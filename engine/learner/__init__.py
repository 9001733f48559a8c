"""What learns: objective, optimizer, and their state."""
