"""The model contract: whatever must be identical at training and at serving."""
