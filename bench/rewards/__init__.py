"""The experts, and what the side stream hides."""
