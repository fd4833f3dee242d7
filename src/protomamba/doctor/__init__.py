"""What is slow or missing on this machine, and why."""
