"""Output for people: the terminal, and reports with figures."""
