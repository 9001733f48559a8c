"""The modules of a policy, and how token sequences go through them."""
