"""The run's loop: hears the devices, asks the rules, and carries out what they decide."""
