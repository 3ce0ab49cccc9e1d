"""What decides, as pure functions: no network, no disk, no clock."""
