"""What runs on a Ray cluster. Nothing here is imported unless a setting asks for it."""
