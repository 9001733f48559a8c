"""The loss against its peers."""
