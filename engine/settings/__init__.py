"""Options, errors, device, and the flags of training and of the rewards."""
