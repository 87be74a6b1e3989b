"""What every floor may use: settings, typed errors, the clock, ids. Imports nothing of ours."""
