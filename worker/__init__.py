"""How a model comes to be: split, methods, metrics, comparison, report; one job in one child process."""
