"""README, the pages of the documentation, and the demands that they answer."""
