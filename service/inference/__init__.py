"""The engine's process and its handle for the API: requests in, batches over one base, probabilities out."""
