"""Learning rates that are measured or computed."""
