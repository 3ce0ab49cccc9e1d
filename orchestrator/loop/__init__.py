"""The run's loop: listens to devices, lets the rules decide, and does what they say."""
